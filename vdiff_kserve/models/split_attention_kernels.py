"""Triton kernels of attention of few queries over many keys.

Numbers that differ from pass to pass are not compiled for: a round would wait for the compiler.
Triton evaluates annotations, so that only its own are there; what is in capitals is a constant of
the compiled kernel.
"""
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["kv_heads", "tokens", "splits"],
    do_not_specialize_on_alignment=["cu_queries", "cu_keys"],
)
def split_attention_kernel(
    query,
    key,
    value,
    cu_queries,
    cu_keys,
    out,
    weights,
    key_stride,
    value_stride,
    scale,
    kv_heads,
    size,
    tokens,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program per [tile of queries and head of keys], row and split of its keys.

    `query` is [tokens, kv_heads * GROUP, size]; a tile has `ROWS` pairs of a token and one of the
    `GROUP` heads that share keys. `key` and `value` are [places, kv_heads, size], a place every
    `key_stride` and `value_stride` elements. `out` is [splits, tokens, heads, size], `weights`
    float32 [splits, tokens, heads]: the logarithm, to base 2, of the sum that `out` is divided by.
    `scale` is that of the scores times the logarithm of e to base 2.
    """
    tile, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    sequence, split = 2 * tl.program_id(1) + 1, tl.program_id(2)
    first = tl.load(cu_queries + sequence)
    count = (tl.load(cu_queries + sequence + 1) - first) * GROUP
    if tile * ROWS >= count:
        return
    begin = tl.load(cu_keys + sequence)
    length = tl.load(cu_keys + sequence + 1) - begin
    low = split * tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    high = tl.minimum(low + tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS, length)

    index, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    asked, inside = index < count, column < size
    token, head = first + index // GROUP, kv_head * GROUP + index % GROUP
    place = token.to(tl.int64) * kv_heads * GROUP + head
    mask = asked[:, None] & inside[None, :]
    q = tl.load(query + place[:, None] * size + column[None, :], mask=mask, other=0.0)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE), tl.float32)
    for start in range(low, high, KEYS):
        at = start + tl.arange(0, KEYS)
        seen, stored = at < high, (begin + at).to(tl.int64)
        k_place = key + stored[None, :] * key_stride + kv_head * size + column[:, None]
        k = tl.load(k_place, mask=inside[:, None] & seen[None, :], other=0.0)
        score = tl.where(seen[None, :], tl.dot(q, k) * scale, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        weight, shrink = tl.exp2(score - higher[:, None]), tl.exp2(peak - higher)
        v_place = value + stored[:, None] * value_stride + kv_head * size + column[None, :]
        v = tl.load(v_place, mask=seen[:, None] & inside[None, :], other=0.0)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        peak = higher

    total = tl.where(total == 0.0, 1.0, total)  # of a split without keys, whose peak is -inf
    own = split.to(tl.int64) * tokens * kv_heads * GROUP + place
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + own[:, None] * size + column[None, :], result, mask=mask)
    tl.store(weights + own, peak + tl.log2(total), mask=asked)


@triton.jit(do_not_specialize=["count", "splits"])
def join_splits_kernel(
    parts, weights, out, count, size, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr
):
    """One program per token and head: the mean of its splits by their weights.

    `parts` is [splits, count, size], `weights` [splits, count], `out` [count, size].
    """
    place = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    used = split < splits
    log = tl.load(weights + split * count + place, mask=used, other=-float("inf"))
    peak = tl.max(log, axis=0)
    weight = tl.exp2(log - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(weight, axis=0)
    weight = weight / tl.where(total == 0.0, 1.0, total)  # of a sequence without keys
    own = (split * count + place)[:, None] * size + column[None, :]
    inside = column < size
    part = tl.load(parts + own, mask=used[:, None] & inside[None, :], other=0.0)
    mean = tl.sum(part * weight[:, None], axis=0).to(out.dtype.element_ty)
    tl.store(out + place * size + column, mean, mask=inside)
