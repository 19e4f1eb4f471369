"""Triton kernels of what stands around the matrix products of experts.

What is in capitals is a constant of the compiled kernel, as a model's own numbers are. Nothing is
compiled for that differs from pass to pass, as the places of tensors in one piece of memory do.
"""
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["first", "scaling"],
    do_not_specialize_on_alignment=["experts", "ranks", "weights"],
)
def choose_kernel(
    logits,
    bias,
    experts,
    ranks,
    weights,
    counts,
    number,
    first,
    scaling,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    CHOSEN: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token: its experts, and how many tokens each of them had before it.

    `logits` is float32 [tokens, number]; `experts`, `ranks` int32 and `weights` float32 are
    [tokens, CHOSEN]; `counts` int32 [number] is 0 before. Experts are numbered from `first` on.
    Scores that are no number are never chosen while others are left.
    """
    token = tl.program_id(0).to(tl.int64)
    index, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    inside = index < number
    logit = tl.load(logits + token * number + index, mask=inside, other=-float("inf"))
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    preference = score
    if BIASED:
        preference += tl.load(bias + index, mask=inside, other=0.0)
    preference = tl.where(inside & (preference == preference), preference, -float("inf"))
    if KEPT < GROUPS:
        grouped = tl.reshape(preference, (GROUPS, BLOCK // GROUPS))
        best, column = tl.argmax(grouped, axis=1), tl.arange(0, BLOCK // GROUPS)
        others = tl.where(column[None, :] == best[:, None], -float("inf"), grouped)
        standing = tl.max(grouped, axis=1) + tl.max(others, axis=1)
        group, kept = tl.arange(0, GROUPS), tl.zeros((GROUPS,), tl.int32)
        for _ in tl.static_range(KEPT):
            leader = group == tl.argmax(standing, axis=0)
            kept = tl.where(leader, 1, kept)
            standing = tl.where(leader, -float("inf"), standing)
        grouped = tl.where(kept[:, None] == 1, grouped, -float("inf"))
        preference = tl.reshape(grouped, (BLOCK,))

    expert, weight = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for i in tl.static_range(CHOSEN):
        leading = index == tl.argmax(preference, axis=0)
        expert = tl.where(slot == i, tl.sum(tl.where(leading, index, 0), axis=0), expert)
        weight = tl.where(slot == i, tl.sum(tl.where(leading, score, 0.0), axis=0), weight)
        preference = tl.where(leading, -float("inf"), preference)
    if RENORMALIZES:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)

    used, place = slot < CHOSEN, token * CHOSEN + slot
    held = (expert - first + number) % number
    rank = tl.atomic_add(counts + held, 1, mask=used)
    tl.store(experts + place, held, mask=used)
    tl.store(ranks + place, rank, mask=used)
    tl.store(weights + place, weight * scaling, mask=used)


@triton.jit(do_not_specialize_on_alignment=["experts", "ranks", "places", "chosen"])
def spread_kernel(
    x,
    experts,
    ranks,
    counts,
    rows,
    places,
    chosen,
    ends,
    size,
    number,
    CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and expert of it: the token's copy among those of its expert.

    `x` is [tokens, size], `rows` [tokens * CHOSEN, size] with an expert's tokens after those of the
    expert before it; `places` int32 [tokens, CHOSEN] is where they are there, `chosen` int32
    [tokens * CHOSEN] whose they are, `ends` int32 [number] where those of each expert end.
    """
    pick = tl.program_id(0).to(tl.int64)
    index, column = tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    count = tl.load(counts + index, mask=index < number, other=0)
    if pick == 0:
        tl.store(ends + index, tl.cumsum(count, axis=0), mask=index < number)
    expert = tl.load(experts + pick)
    place = tl.sum(tl.where(index < expert, count, 0), axis=0) + tl.load(ranks + pick)
    tl.store(places + pick, place)
    tl.store(chosen + place, expert)
    inside = column < size
    row = tl.load(x + pick // CHOSEN * size + column, mask=inside)
    tl.store(rows + place.to(tl.int64) * size + column, row, mask=inside)


@triton.jit(
    do_not_specialize=["held"],
    do_not_specialize_on_alignment=["experts", "places", "weights"],
)
def join_kernel(
    computed,
    experts,
    places,
    weights,
    other,
    out,
    size,
    held,
    ADDS: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and `BLOCK` columns: what its experts made of it, weighted, and
    `other`.

    `computed` is [tokens * CHOSEN, size], of which rows of experts from `held` on are nothing;
    `other` and `out` are [tokens, size].
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(CHOSEN):
        pick = token * CHOSEN + i
        place = tl.load(places + pick).to(tl.int64)
        end = tl.where(tl.load(experts + pick) < held, size, 0)
        row = tl.load(computed + place * size + column, mask=column < end, other=0.0)
        total += tl.load(weights + pick) * row.to(tl.float32)
    if ADDS:
        total += tl.load(other + token * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)
