"""Triton kernels of what stands between a layer's matrix products. They round where the plain
operations of `layers` do: to the number type of their tensors.

Tensors are contiguous. Triton evaluates annotations, so that only its own are there; what is in
capitals is a constant of the compiled kernel.
"""
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, out, size, eps, BLOCK: tl.constexpr):
    """One program per row of `x` [rows, size]."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(x + row + column, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(own.dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (normed * weights).to(own.dtype), mask=inside)


@triton.jit
def rotate_kernel(x, cos, sin, out, heads, size, rotary, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token of `x` [tokens, heads, size]; `cos` and `sin` are [tokens, rotary]."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    half = rotary // 2
    partner = tl.where(column < half, column + half, column - half)
    turned = column < rotary
    inside = (head < heads) & (column < size)
    place = x + token * heads * size + head * size
    own = tl.load(place + column, mask=inside, other=0.0)
    other = tl.load(place + partner, mask=inside & turned, other=0.0).to(tl.float32)
    c = tl.load(cos + token * rotary + column, mask=turned, other=0.0)
    s = tl.load(sin + token * rotary + column, mask=turned, other=0.0).to(tl.float32)
    first = (own.to(tl.float32) * c.to(tl.float32)).to(c.dtype).to(tl.float32)
    rotated = (first + other * s).to(c.dtype).to(own.dtype)
    result = tl.where(turned, rotated, own)
    tl.store(out + token * heads * size + head * size + column, result, mask=inside)


@triton.jit
def silu_product_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """`silu(gate) * up`, `BLOCK` of `count` elements per program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    own = tl.load(gate + place, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(own.dtype).to(tl.float32)
    factor = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (activated * factor).to(own.dtype), mask=inside)
