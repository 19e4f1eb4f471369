"""A Triton kernel that draws a token without writing scores or noise anywhere.

Triton evaluates annotations, so that only its own are there; what is in capitals is a constant of
the compiled kernel.
"""
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """SplitMix64's finalizer, as `noise._mix`; `x` is uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(
    do_not_specialize=["vocab", "mask_token", "parts"],  # what a check compiled serves all models
    do_not_specialize_on_alignment=["places", "temperature", "key"],
)
def draw_kernel(
    logits, places, temperature, key, best, token, vocab, mask_token, parts, BLOCK: tl.constexpr
):
    """One program per position and `BLOCK` tokens: the highest score among them and its token.

    `logits` is float32 [all positions, vocab]; `places`, `temperature` (float64) and `key` (int64)
    are of the sampled ones; `best` (float64) and `token` (int64) are [sampled positions, parts].
    """
    position, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(places + position).to(tl.int64) * vocab
    inside = (column < vocab) & (column != mask_token)
    own = tl.load(logits + row + column, mask=inside, other=-float("inf")).to(tl.float64)
    lane = (column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = mix(tl.load(key + position).to(tl.uint64, bitcast=True) + lane) >> 12
    uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    score = own / tl.load(temperature + position) - tl.log(-tl.log(uniform))
    highest = tl.max(score, axis=0)
    first = tl.min(tl.where(score == highest, column, part * BLOCK + BLOCK - 1), axis=0)
    tl.store(best + position * parts + part, highest)
    tl.store(token + position * parts + part, tl.minimum(first, vocab - 1).to(tl.int64))
