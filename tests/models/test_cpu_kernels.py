"""Kernels for CPUs: what they compute, for which shapes, and when they are left out."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.device import needs_cpu_library
from vdiff_kserve import cpu_library
from vdiff_kserve.models import ForwardBatch, RowSpan, cpu_kernels, layers
from vdiff_kserve.models.batch import KeyValueStore, SeenKeys

needs_kernels = needs_cpu_library
CAPACITY = 1500


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def expected(
    query: Tensor, key: Tensor, value: Tensor, cached: tuple[Tensor, Tensor], seen: SeenKeys
) -> Tensor:
    """Part by part in float32: [queries, heads * head_dim]."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for first, queries, is_cached, place, keys in seen.numbers.tolist():
        k, v = cached if is_cached else (key, value)
        q, k, v = (
            t.narrow(0, begin, count).float().transpose(0, 1)
            for t, begin, count in ((query, first, queries), (k, place, keys), (v, place, keys))
        )
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        weights = (q @ k.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(8, 8, 32), (4, 2, 64), (7, 1, 128), (2, 2, 48), (1, 1, 16), (2, 1, 512)],
)
def test_attention_is_that_of_every_part(heads: int, kv_heads: int, size: int) -> None:
    """Numbers of queries and keys on both sides of the kernel's blocks and tiles."""
    torch.manual_seed(0)
    counts = [(32, 481), (1, 1), (17, 512), (33, 513), (150, 1025), (5, 7), (16, 64)]
    numbers, query = [], 0
    for i, (queries, keys) in enumerate(counts):
        numbers.append((query, queries, i % 2, query + 3, keys if i % 2 else min(keys, 90)))
        query += queries
    seen = SeenKeys(torch.tensor(numbers), len(counts), None)
    q, key, value = normal(query, heads, size), *normal(2, query + 200, kv_heads, size)
    cached = normal(CAPACITY, kv_heads, size), normal(CAPACITY, kv_heads, size)
    got = cpu_kernels.attend(q, key, value, cached, seen)
    torch.testing.assert_close(
        got.float(), expected(q, key, value, cached, seen), atol=0.01, rtol=0.02
    )


@needs_kernels
def test_attention_of_a_row_is_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    query, key, value = normal(64, 4, 32), normal(64, 4, 32), normal(64, 4, 32)
    cached = normal(600, 4, 32), normal(600, 4, 32)
    numbers = torch.tensor([(0, 32, 1, 0, 300), (32, 32, 1, 300, 299)])
    both = cpu_kernels.attend(query, key, value, cached, SeenKeys(numbers, 2, None))
    numbers[1, 0] = 0
    alone = SeenKeys(numbers[1:], 1, None)
    assert cpu_kernels.attend(query[32:], key, value, cached, alone).equal(both[32:])


@needs_kernels
def test_attention_of_large_scores_stays_finite() -> None:
    """The largest score comes in a late tile, so that what came before is weighed down to 0."""
    query, key = (
        torch.full((3, 1, 16), 30.0).bfloat16(),
        torch.full((1100, 1, 16), -30.0).bfloat16(),
    )
    key[1050] = 30.0
    value = normal(1100, 1, 16)
    seen = SeenKeys(torch.tensor([(0, 3, 0, 0, 1100)]), 1, None)
    got = cpu_kernels.attend(query, key, value, None, seen)
    assert got.equal(value[1050].expand(3, 16))


@needs_kernels
@pytest.mark.parametrize("where", [0, 5, 130, 199])
def test_what_is_no_number_is_told_by_whoever_sees_it(where: int) -> None:
    """A broken key must not pass for one that nobody looks at."""
    query, key, value = normal(6, 1, 16), normal(400, 1, 16), normal(400, 1, 16)
    key[where, 0, 3] = torch.nan
    seen = SeenKeys(torch.tensor([(0, 3, 0, 0, 200), (3, 3, 0, 200, 200)]), 2, None)
    got = cpu_kernels.attend(query, key, value, None, seen)
    assert got[:3].isnan().all()
    assert got[3:].isfinite().all()


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the kernels out."""
    monkeypatch.setattr(cpu_kernels, "works", lambda: False)


@needs_kernels
@pytest.mark.parametrize("size", [16, 48, 100, 256])
def test_norms_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    torch.manual_seed(0)
    norm = layers.RMSNorm(size, 1e-5).bfloat16()
    norm.weight.copy_(normal(size))
    x, other = normal(2, 37, size)
    for small in (x, other):
        small[:9] *= 1e-3  # whose squares are as small as what is added to them
    fast, (total, of_sum) = norm(x), norm.of_sum(x, other)
    plain(monkeypatch)
    assert total.equal(x + other)
    for got, want in ((fast, norm(x)), (of_sum, norm(total))):
        torch.testing.assert_close(got, want)
        assert got.eq(want).float().mean() > 0.98, "both round before they multiply"


@needs_kernels
@pytest.mark.parametrize(("size", "rotary_dim"), [(32, 32), (128, 128), (80, 40), (64, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, size: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = normal(37, 3, size)
    cos, sin = (t.to(dtype) for t in layers.rotary_angles(torch.arange(37), rotary_dim, 1e4))
    fast = layers.rotate(x, cos, sin)
    plain(monkeypatch)
    in_float32 = layers.rotate(x, cos.float(), sin.float())
    torch.testing.assert_close(fast, in_float32)


@needs_kernels
def test_rows_are_kept_at_their_places() -> None:
    fresh, places = normal(5, 2, 24), torch.tensor([9, 0, 4])
    stored = torch.zeros((10, 2, 24), dtype=torch.bfloat16)
    cpu_kernels.keep(fresh, torch.tensor([4, 2, 3]), places, stored)
    assert stored[places].equal(fresh[[4, 2, 3]])
    assert not stored[[1, 2, 3, 5, 6, 7, 8]].any()
    cpu_kernels.keep(fresh[:3], None, places, stored)
    assert stored[places].equal(fresh[:3])


def test_what_queries_see_is_told_in_numbers() -> None:
    """A cached block, whose keys are in the cache; a whole row without a cache; wanted ones."""
    spans = (RowSpan(32, 32, 96, 40, 8, cache_offset=500), RowSpan(0, 10, 10, 4, 6))
    empty = torch.zeros(0)
    batch = ForwardBatch(torch.zeros(42, dtype=torch.int64), spans, KeyValueStore(empty, empty))
    assert batch.seen_keys(None, False).numbers.tolist() == [
        [0, 32, 1, 500, 96],
        [32, 10, 0, 32, 10],
    ]
    assert batch.seen_keys(None, True).numbers.tolist() == [[0, 8, 1, 500, 96], [8, 6, 0, 32, 10]]
    by_block = batch.seen_keys(4, True)
    assert by_block.numbers[2:].tolist() == [[8, 4, 0, 32, 8], [12, 2, 0, 32, 10]]
    assert (by_block.parts, by_block.rows, by_block.block) == (4, 2, 4)


@needs_kernels
def test_attention_by_parts_of_few_queries_is_torchs() -> None:
    """A causal row is one part for each of its queries, which would leave the lanes empty."""
    x = normal(60, 4, 32)
    batch = ForwardBatch.dense(torch.zeros((1, 60), dtype=torch.int64))
    assert cpu_kernels.can_attend(x, x, x, batch.seen_keys(None, False))
    assert cpu_kernels.can_attend(x, x, x, batch.seen_keys(16, False))
    shared = normal(60, 2, 32)
    assert cpu_kernels.can_attend(x, shared, shared, batch.seen_keys(4, False))
    assert not cpu_kernels.can_attend(x, x, x, batch.seen_keys(4, False))
    assert not cpu_kernels.can_attend(x, x, x, batch.seen_keys(1, False))
    last = ForwardBatch(torch.zeros(2, dtype=torch.int64), (RowSpan(59, 1, 60, 59, 1, 0),) * 2)
    assert cpu_kernels.can_attend(x, x, x, last.seen_keys(1, False))
    odd = normal(60, 4, 24)
    assert not cpu_kernels.can_attend(odd, odd, odd, batch.seen_keys(None, False))


@needs_kernels
def test_other_types_and_training_take_torch() -> None:
    x = normal(3, 16)
    assert cpu_kernels.usable(x)
    assert not cpu_kernels.usable(x.float())
    assert not cpu_kernels.usable(x.t())
    with torch.inference_mode(mode=False), torch.enable_grad():
        assert not cpu_kernels.usable(x)


@needs_kernels
@pytest.mark.parametrize("name", ["attend", "rotate", "rms_norm", "add_rms_norm", "keep"])
def test_wrong_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert cpu_kernels.agrees()
    right = getattr(cpu_kernels, name)

    def wrong(*arguments: object) -> object:
        return right(*(a.flip(0) if a is arguments[0] else a for a in arguments))

    monkeypatch.setattr(cpu_kernels, name, wrong)
    assert not cpu_kernels.agrees()


def test_without_a_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "is_available", lambda: False)
    cpu_kernels.works.cache_clear()
    try:
        assert not cpu_kernels.works()
        assert layers.RMSNorm(8, 1e-5).bfloat16()(normal(2, 8)).isfinite().all()
    finally:
        cpu_kernels.works.cache_clear()
