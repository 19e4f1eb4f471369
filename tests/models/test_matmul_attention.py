"""Attention as two products equals torch's own, within what bfloat16 can tell."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff_kserve.models import matmul_attention
from vdiff_kserve.models.batch import AttentionGroup
from vdiff_kserve.models.layers import attend, block_causal_mask
from vdiff_kserve.models.matmul_attention import attend_row, prefers_products

CPU = torch.device("cpu")


def random_row(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, places: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    query = torch.randn(queries, heads, head_dim, generator=generator)
    key, value = torch.randn(2, places or keys, kv_heads, head_dim, generator=generator)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.float().transpose(0, 1) for t in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return attended.transpose(0, 1).flatten(1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 64), (6, 2, 32), (7, 1, 128)])
@pytest.mark.parametrize(("queries", "keys"), [(32, 300), (96, 96), (1, 33)])
@pytest.mark.parametrize("block", [None, 32, 1])
def test_a_row_equals_exact_attention(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, block: int | None
) -> None:
    query, key, value = random_row(queries, keys, heads, kv_heads, head_dim)
    mask = None if block is None else block_causal_mask(queries, keys, block, CPU)
    found = attend_row(query, key, value, mask)
    assert found.dtype == torch.bfloat16
    assert found.shape == (queries, heads * head_dim)
    assert error(found, exact(query, key, value, mask)) < 0.01


@pytest.mark.parametrize("tile", [1, 7 * 4 * 50, 1 << 30])
@pytest.mark.parametrize("block", [None, 16])
def test_tiles_change_nothing(
    tile: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = random_row(50, 50, 4, 2, 16)
    mask = None if block is None else block_causal_mask(50, 50, block, CPU)
    expected = exact(query, key, value, mask)
    monkeypatch.setattr(matmul_attention, "TILE_SCORES", tile)
    assert error(attend_row(query, key, value, mask), expected) < 0.01


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16"}, True),
        ({"avx512_bf16", "amx_bf16"}, False),
        ({"avx2"}, False),
        (set(), False),
    ],
)
def test_the_processor_decides(
    flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_attention, "cpu_flags", lambda: flags)
    assert matmul_attention._multiplies_bfloat16.__wrapped__() is expected


def test_it_is_for_large_rows_in_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_attention, "_multiplies_bfloat16", lambda: True)
    query = torch.empty(0, 8, 64, dtype=torch.bfloat16)
    assert prefers_products(query, 32, 400)
    assert not prefers_products(query, 32, 300)
    assert not prefers_products(query.float(), 32, 400)
    assert not prefers_products(query.to("meta"), 32, 400)
    monkeypatch.setattr(matmul_attention, "_multiplies_bfloat16", lambda: False)
    assert not prefers_products(query, 32, 400)


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_take_either_way_to_the_same_result(
    cached: bool, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 64 queries, whose keys lie end to end or, 96 of each, at places of the cache."""
    keys = 96 if cached else 64
    query, key, value = random_row(128, 128, 8, 4, 32, places=300 if cached else 128)
    offsets = (7, 150) if cached else None
    group = AttentionGroup(2, 64, 64, keys, offsets)
    store = (key, value) if cached else None
    ways = []
    for products in (False, True):
        monkeypatch.setattr(
            "vdiff_kserve.models.layers.prefers_products", lambda *_, way=products: way
        )
        ways.append(attend(query, key, value, [group], store, block))
    places = offsets or (0, 64)
    mask = None if block is None else block_causal_mask(64, keys, block, CPU)
    expected = torch.cat(
        [
            exact(row, key[place : place + keys], value[place : place + keys], mask)
            for row, place in zip(query.split(64), places, strict=True)
        ]
    )
    for way in ways:
        assert way.shape == expected.shape
        assert error(way, expected) < 0.01
