"""One denoising step over many rows, second half: which positions are committed."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff_kserve.sampler.noise import gumbel_of, uniform
from vdiff_kserve.sampler.params import (
    APD_CONFIDENCE,
    DREAM_POLICIES,
    SCHEDULED_POLICIES,
    DecodingParams,
)
from vdiff_kserve.sampler.step import Proposal, StepRows


def select(proposal: Proposal, rows: StepRows) -> Tensor:
    """Which positions get their candidate: bool [positions].

    At least one masked position of every row is committed, but for a scheduled row whose quota is 0
    and for an editing row without masks.
    """
    masked = rows.written < 0
    priority = _priority(proposal, rows).masked_fill(~masked, -torch.inf)
    rank = rank_in_row(priority, rows.row)
    accept = (rank == 0) & masked
    confidence = proposal.confidence

    scheduled = rows.with_policy(*SCHEDULED_POLICIES)
    if scheduled is not None:
        by_quota = rank < rows.per_position(rows.quotas, torch.int64)
        accept = torch.where(scheduled, by_quota, accept)
        for i, p in enumerate(rows.params):
            if p.confidence_eos_eot_inf and p.policy in SCHEDULED_POLICIES:
                _break_ties_as_topk(accept, priority, rows, i)
    threshold = rows.per_position([p.threshold for p in rows.params])
    strict = rows.where(lambda p: p.strict_threshold)
    sure = confidence >= threshold if strict is None else _reaches(confidence, threshold, strict)
    sure &= masked
    by_threshold = rows.with_policy("threshold", "credit", "edit", "local")
    if by_threshold is not None:
        accept = torch.where(by_threshold, accept | sure, accept)
    by_apd = rows.with_policy("apd")
    if by_apd is not None:
        least = rows.per_position([_apd_confidence(p) for p in rows.params])
        allowed = (rank < rows.per_position(rows.quotas, torch.int64)) & (confidence >= least)
        accept = torch.where(by_apd, accept | (allowed & masked), accept)
    by_neighbour = rows.with_policy("local")
    if by_neighbour is not None:
        accept = torch.where(by_neighbour, accept | _near_anchor(sure, proposal, rows), accept)
    by_factor = rows.with_policy("factor")
    if by_factor is not None:
        accept = torch.where(by_factor, _within_factor(confidence, rank, rows), accept)
    by_entropy = rows.with_policy("entropy_bound")
    if by_entropy is not None:
        accept = torch.where(by_entropy, _within_entropy(-proposal.score, rank, rows), accept)
    editing = rows.with_policy("edit")
    if editing is not None:
        edit_threshold = rows.per_position([p.edit_threshold for p in rows.params])
        better = (confidence > edit_threshold) & (proposal.token != rows.written) & ~masked
        accept = torch.where(editing, accept | better, accept)
    return accept


def _reaches(confidence: Tensor, threshold: Tensor, strict: Tensor) -> Tensor:
    return torch.where(strict, confidence > threshold, confidence >= threshold)


def _apd_confidence(params: DecodingParams) -> float:
    return APD_CONFIDENCE if params.apd_threshold is None else params.apd_threshold


def _priority(proposal: Proposal, rows: StepRows) -> Tensor:
    """What ranks the positions of a row, highest first."""
    priority = proposal.score
    shuffled = rows.with_policy("random")
    heated = rows.where(lambda p: p.policy in DREAM_POLICIES and p.alg_temp > 0)
    if shuffled is None and heated is None:
        return priority
    seeds = rows.per_position([p.seed for p in rows.params], torch.int64)
    order = uniform(seeds, rows.position, "order").squeeze(-1)
    if shuffled is not None:
        priority = torch.where(shuffled, order, priority)
    if heated is not None:
        # Gumbel top-k draws without replacement from softmax(score / alg_temp).
        alg_temp = rows.per_position([p.alg_temp or 1.0 for p in rows.params])
        priority = torch.where(heated, proposal.score / alg_temp + gumbel_of(order), priority)
    return priority


def _near_anchor(anchor: Tensor, proposal: Proposal, rows: StepRows) -> Tensor:
    """Masked positions within `radius` of an anchor of their row that reach the lower threshold."""
    radius = rows.per_position([p.radius for p in rows.params], torch.int64)
    lower = rows.per_position([p.neighbour_threshold for p in rows.params])
    distance = (rows.position[:, None] - rows.position[None, anchor]).abs()
    same_row = rows.row[:, None] == rows.row[None, anchor]
    near = (same_row & (distance <= radius[:, None])).any(dim=-1)
    return near & (proposal.confidence >= lower) & (rows.written < 0)


def _within_factor(confidence: Tensor, rank: Tensor, rows: StepRows) -> Tensor:
    """The leading run of most confident positions with (n + 1) * (1 - confidence_n) < factor.

    As in Fast-dLLM's published code, the least confident position is let through when it is the
    only one that fails.
    """
    factor = rows.per_position([p.factor for p in rows.params])
    masked = rows.written < 0
    failing = (confidence < 1 - factor / (rank + 2)) & (rank > 0) & masked
    masks = torch.zeros(len(rows.params), dtype=torch.int64, device=rank.device)
    masks = masks.index_add(0, rows.row, masked.long())
    first_failure = masks.scatter_reduce(0, rows.row[failing], rank[failing], "amin")
    first_failure = torch.where(first_failure == masks - 1, masks, first_failure)
    return (rank < first_failure[rows.row]) & masked


def _within_entropy(entropy: Tensor, rank: Tensor, rows: StepRows) -> Tensor:
    """The positions of least entropy whose entropies, but for the largest, sum to the bound."""
    bound = rows.per_position([p.entropy_bound for p in rows.params])
    order = torch.argsort(rows.row * len(rank) + rank)
    ranked = entropy[order]
    before = ranked.cumsum(0) - ranked
    starts = torch.searchsorted(rows.row, rows.row)
    before_in_row = before - before[starts]
    allowed = torch.empty_like(rank, dtype=torch.bool)
    allowed[order] = (before_in_row <= bound[order]) | (rank[order] == 0)
    return allowed & (rows.written < 0)


def _break_ties_as_topk(accept: Tensor, priority: Tensor, rows: StepRows, i: int) -> None:
    """Choose row `i`'s positions by `torch.topk` over its canvas, as LLaDA's loop does.

    Positions whose candidate is a suppressed end token all have confidence 0; which of these equals
    goes first is decided by topk's own order, so that is what gives the published results.
    """
    here = (rows.row == i).nonzero().squeeze(-1)
    canvas = torch.full((rows.lengths[i],), -torch.inf, device=priority.device)
    canvas[rows.position[here]] = priority[here].float()
    chosen = canvas.topk(min(rows.quotas[i], len(here))).indices
    accept[here] = torch.isin(rows.position[here], chosen)


def rank_in_row(priority: Tensor, row: Tensor) -> Tensor:
    """Rank of each position among its row's, 0 for the highest priority; ties go to the left.

    Args:
        priority: [positions].
        row: int64 [positions], ascending.
    """
    by_priority = priority.argsort(descending=True, stable=True)
    order = by_priority[row[by_priority].argsort(stable=True)]
    places = torch.arange(len(row), device=row.device)
    first_of_row = torch.searchsorted(row, row)
    rank = torch.empty_like(places)
    rank[order] = places - first_of_row
    return rank
