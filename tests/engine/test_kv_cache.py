"""Cache places: lent without overlap, whole again when all came back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_models import LLADA_8B
from tests.engine.tiny import CONFIG
from vdiff_kserve.engine import EngineConfig, bytes_per_token, scratch_bytes
from vdiff_kserve.engine.kv_cache import KVCache, memory_for_cache
from vdiff_kserve.models import ModelSpec

GIB = 1 << 30
CUDA = torch.device("cuda", 0)


def cache_of(capacity: int) -> KVCache:
    return KVCache(CONFIG, capacity, torch.device("cpu"), torch.float32)


@given(
    capacity=st.integers(1, 60),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 25)), max_size=60),
)
def test_runs_never_overlap_and_all_space_comes_back(
    capacity: int, actions: list[tuple[bool, int]]
) -> None:
    cache, lent = cache_of(capacity), {}
    for take, number in actions:
        if take:
            offset = cache.reserve(number)
            if offset is None:
                assert longest_free_run(lent, capacity) < number
                continue
            places = range(offset, offset + number)
            assert offset >= 0
            assert places.stop <= capacity
            assert not any(set(places) & set(others) for others in lent.values())
            lent[offset] = places
        elif lent:
            offset = sorted(lent)[number % len(lent)]
            cache.release(offset)
            del lent[offset]
        assert cache.used == sum(map(len, lent.values()))
    for offset in lent:
        cache.release(offset)
    assert cache.used == 0
    assert cache.reserve(capacity) == 0


def longest_free_run(lent: dict[int, range], capacity: int) -> int:
    taken = {place for run in lent.values() for place in run}
    longest = current = 0
    for place in range(capacity):
        current = 0 if place in taken else current + 1
        longest = max(longest, current)
    return longest


def test_memory_is_taken_when_first_needed() -> None:
    cache = cache_of(7)
    cache.reserve(3)
    assert "store" not in vars(cache)
    expected = (CONFIG.num_layers, 7 + 1, CONFIG.num_kv_heads, CONFIG.head_dim)
    assert cache.store.keys.shape == cache.store.values.shape == expected


def test_scratch_grows_with_the_longest_pass() -> None:
    """Eight billion parameters keep 115 KB for each token of a pass."""
    assert scratch_bytes(LLADA_8B, torch.bfloat16, 4096) == GIB
    assert scratch_bytes(LLADA_8B, torch.bfloat16, 16384) == pytest.approx(1.98 * GIB, rel=0.02)


@pytest.mark.parametrize(
    ("free", "context", "budget", "left"),
    [
        (64, 4096, 2048, 56 - 1.0),
        (64, 16384, 2048, 56 - 1.98),
        (64, 4096, 16384, 56 - 1.98),
        (64, 10**6, 2048, 28.0),  # half: requests that long would not fit anyway
        (9.5, 10**6, 2048, 0.5),
        (8.5, 4096, 2048, 0.0),
    ],
)
def test_caches_take_what_weights_and_the_longest_pass_leave(
    free: float, context: int, budget: int, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU of 80 GiB, 90 % of which may be used."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * GIB), 80 * GIB))
    model = SimpleNamespace(config=LLADA_8B, dtype=torch.bfloat16, device=CUDA)
    spec = ModelSpec("llada", LLADA_8B, 1, 2, None, context, 32)
    config = EngineConfig(max_num_seqs=1000, max_num_batched_tokens=budget)
    tokens = config.cache_tokens([model], spec)
    per_token = bytes_per_token(LLADA_8B, torch.bfloat16)
    assert tokens * per_token / GIB == pytest.approx(left, abs=0.03)
    assert memory_for_cache(CUDA, 0.9, 0.5, 0) == pytest.approx(max(0, free - 8) * GIB, abs=1)
