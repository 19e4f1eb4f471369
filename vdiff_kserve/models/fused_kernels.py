"""Triton kernels of what stands between a layer's matrix products. They round where the plain
operations of `layers` do: to the number type of their tensors.

Triton evaluates annotations, so that only its own are there; what is in capitals is a constant of
the compiled kernel.
"""
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_rounded(
    x, values, scales, row, place, inside, LARGEST: tl.constexpr, LEAST: tl.constexpr
):
    """`x`, float32, as e4m3 `values` and the scale of its row."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, LEAST)
    within = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    within = tl.where(x == x, within, x)
    tl.store(values + place, within.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def round_kernel(
    x, values, scales, size, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row of `x` [rows, size], which becomes e4m3 `values` with its scale."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    _store_rounded(own, values, scales, row, row * size + column, inside, LARGEST, LEAST)


@triton.jit
def round_product_kernel(
    gate,
    up,
    values,
    scales,
    stride,
    size,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of `silu(gate) * up`, which becomes e4m3 `values` [rows, size] with its
    scale; rows of `gate` and `up` are `stride` elements apart."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(gate + row * stride + column, mask=inside, other=0.0)
    factor = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    wide = own.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(own.dtype).to(tl.float32)
    product = (activated * factor).to(own.dtype).to(tl.float32)
    _store_rounded(product, values, scales, row, row * size + column, inside, LARGEST, LEAST)


@triton.jit
def rms_norm_kernel(
    x,
    other,
    weight,
    total,
    out,
    scales,
    size,
    eps,
    ADDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of `x` [rows, size]. `ADDS` norms `x + other`, which is `total`. With
    `ROUNDS`, `out` is e4m3, with its `scales`."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(x + row + column, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(other + row + column, mask=inside, other=0.0)
        own = (own.to(tl.float32) + added.to(tl.float32)).to(own.dtype)
        tl.store(total + row + column, own, mask=inside)
    wide = own.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(own.dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = (normed * weights).to(own.dtype)
    if ROUNDS:
        wide = result.to(tl.float32)
        number = tl.program_id(0).to(tl.int64)
        _store_rounded(wide, out, scales, number, row + column, inside, LARGEST, LEAST)
    else:
        tl.store(out + row + column, result, mask=inside)


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def heads_kernel(
    x,
    cos,
    sin,
    query_weight,
    key_weight,
    query,
    key,
    places,
    kept_keys,
    kept_values,
    heads,
    kv_heads,
    size,
    rotary,
    eps,
    NORMS: tl.constexpr,
    KEEPS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and `HEADS` heads of `x` [tokens, heads + 2 * kv_heads, size]: heads of
    queries, of keys, then of values.

    The first two are rotated by `cos` and `sin` [tokens, rotary], with `NORMS` after a norm with
    the weights [size], and written to `query` [tokens, heads, size] and `key` [tokens, kv_heads,
    size]. `KEEPS` also writes keys and values to the places of their tokens, int64 [tokens], in
    `kept_keys` and `kept_values` [places, kv_heads, size].
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_query, is_value = head < heads, head >= heads + kv_heads
    inside = (head < heads + 2 * kv_heads) & (column < size)
    half = rotary // 2
    partner = tl.where(column < half, column + half, column - half)
    turned = column < rotary

    place = x + token * (heads + 2 * kv_heads) * size + head * size
    stored = tl.load(place + column, mask=inside, other=0.0)
    own = stored
    other = tl.load(place + partner, mask=inside & turned & ~is_value, other=0.0)
    if NORMS:
        wide = stored.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1)[:, None] / size + eps)
        q_own = tl.load(query_weight + column, mask=column < size, other=0.0)
        k_own = tl.load(key_weight + column, mask=column < size, other=0.0)
        q_other = tl.load(query_weight + partner, mask=turned, other=0.0)
        k_other = tl.load(key_weight + partner, mask=turned, other=0.0)
        own_weight = tl.where(is_query, q_own, k_own).to(tl.float32)
        other_weight = tl.where(is_query, q_other, k_other).to(tl.float32)
        normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
        own = (normed * own_weight).to(x.dtype.element_ty)
        normed = (other.to(tl.float32) * scale).to(x.dtype.element_ty).to(tl.float32)
        other = (normed * other_weight).to(x.dtype.element_ty)
    c = tl.load(cos + token * rotary + column, mask=turned, other=0.0)
    s = tl.load(sin + token * rotary + column, mask=turned, other=0.0).to(tl.float32)
    first = (own.to(tl.float32) * c.to(tl.float32)).to(c.dtype).to(tl.float32)
    rotated = (first + other.to(tl.float32) * s).to(c.dtype).to(own.dtype)
    result = tl.where(turned, rotated, own)

    tl.store(query + token * heads * size + head * size + column, result, mask=inside & is_query)
    is_key = inside & (head >= heads) & (head < heads + kv_heads)
    key_head = (head - heads) * size + column
    tl.store(key + token * kv_heads * size + key_head, result, mask=is_key)
    if KEEPS:
        kept = tl.load(places + token) * kv_heads * size
        tl.store(kept_keys + kept + key_head, result, mask=is_key)
        value_head = (head - heads - kv_heads) * size + column
        tl.store(kept_values + kept + value_head, stored, mask=inside & is_value)


@triton.jit
def silu_product_kernel(gate, up, out, stride, size, BLOCK: tl.constexpr):
    """`silu(gate) * up`, `BLOCK` columns of a row per program; rows of `gate` and `up` are `stride`
    elements apart, `out` is [rows, size]."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(gate + row * stride + column, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(own.dtype).to(tl.float32)
    factor = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (activated * factor).to(own.dtype), mask=inside)
