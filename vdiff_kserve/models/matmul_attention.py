"""Attention on a CPU in bfloat16 as two matrix products over all heads of a row.

torch's own CPU kernel multiplies head by head and never shares a key between the queries of a
group; oneDNN's batched products take all heads at once, and all queries that share keys as one
matrix. The scores between the two products are rounded to bfloat16, as eager attention has them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vdiff_kserve.cpu_library import cpu_flags

LEAST_PRODUCTS = 6_000_000
"""Multiplications of queries and keys from which the products are faster. Each call has a fixed
cost, about 60 microseconds more than torch's kernel."""

TILE_SCORES = 1 << 21
"""Scores that are computed at a time: they stay in the processor's caches."""


def prefers_products(query: Tensor, queries: int, keys: int) -> bool:
    """Whether `attend_row` is the faster way for rows of this size.

    Args:
        query: [any number of tokens, heads, head_dim].
        queries: query tokens of a row; `keys` are those that they see.
    """
    heads, head_dim = query.shape[-2:]
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and queries * keys * heads * head_dim >= LEAST_PRODUCTS
        and _multiplies_bfloat16()
    )


@cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has instructions for it. With AMX, torch's kernel uses those tiles itself."""
    flags = cpu_flags()
    return (
        torch.backends.mkldnn.is_available() and "avx512_bf16" in flags and "amx_bf16" not in flags
    )


def attend_row(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one row's queries to its keys.

    Args:
        query: [queries, heads, head_dim].
        key: [keys, kv heads, head_dim], as `value`. Heads of the query are grouped by them.
        mask: bool [queries, keys], what each query sees; None is everything.

    Returns:
        [queries, heads * head_dim]
    """
    heads, head_dim = query.shape[1:]
    keys, kv_heads = key.shape[:2]
    transposed = key.transpose(0, 1).contiguous().transpose(1, 2)  # [kv heads, head_dim, keys]
    values = value.transpose(0, 1)
    grouped = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    tile = max(1, TILE_SCORES // (heads * keys))
    outputs = []
    for begin in range(0, len(query), tile):
        part = grouped[:, :, begin : begin + tile]  # [kv heads, group, queries, head_dim]
        seen = None if mask is None else mask[begin : begin + tile]
        weights = _scores(part, transposed, seen).softmax(-1)
        attended = torch.bmm(weights, values).view_as(part)
        outputs.append(attended.permute(2, 0, 1, 3).reshape(-1, heads * head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _scores(query: Tensor, transposed: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled scores of all queries that share keys: [kv heads, group * queries, keys]."""
    kv_heads, group, queries, head_dim = query.shape
    rows = query.reshape(kv_heads, group * queries, head_dim)
    unused = rows.new_empty(())
    scores = torch.baddbmm(unused, rows, transposed, beta=0, alpha=head_dim**-0.5)
    if mask is not None:
        scores.view(kv_heads, group, queries, -1).masked_fill_(~mask, -torch.inf)
    return scores
