"""Cache places: lent without overlap, whole again when all came back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.tiny import CONFIG
from vdiff_kserve.engine.kv_cache import KVCache


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
