"""One denoising step over many rows, second half: which positions are committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler.noise import gumbel_of, uniform
from vdiff_kserve.sampler.params import (
    APD_CONFIDENCE,
    DREAM_POLICIES,
    SCHEDULED_POLICIES,
    STRICT_POLICIES,
    Policy,
)
from vdiff_kserve.sampler.step import Proposal, StepRows


def select(proposal: Proposal, rows: StepRows) -> Tensor:
    """Which positions change: bool [positions]. All get their candidate, but for the written ones
    of rows with policy `p2`: those become masks again.

    At least one masked position of every row is committed, but for a scheduled row whose quota is
    0, for an editing row without masks, and for `p2` when what stays is written already.
    """
    priority = _priority(proposal, rows).masked_fill(~rows.masked, -torch.inf)
    ranking = Ranking(priority, rows)
    surest = first_in_row(priority, rows.row, len(rows.params)) & rows.masked
    accept = surest
    scheduled = rows.with_policy(*SCHEDULED_POLICIES)
    if scheduled is not None:
        accept = torch.where(scheduled, _within_quota(ranking, rows), accept)
        for i, p in enumerate(rows.params):
            if p.confidence_eos_eot_inf and p.policy in SCHEDULED_POLICIES:
                _break_ties_as_topk(accept, priority, rows, i)
    for policies, rule in _RULES:
        own = rows.with_policy(*policies)
        if own is not None:
            accept = torch.where(own, surest | rule(proposal, ranking, rows), accept)
    planned = rows.with_policy("p2")
    if planned is not None:
        accept = torch.where(planned, _unlike_plan(proposal, rows), accept)
    return accept


@dataclass(frozen=True)
class Ranking:
    """The positions of each row in order. Most rules need no more than the first of them, which is
    found without sorting.

    Attributes:
        priority: float64 [positions], highest first; -inf where there is no mask.
    """

    priority: Tensor
    rows: StepRows

    @cached_property
    def rank(self) -> Tensor:
        """int64 [positions], 0 for the first."""
        return rank_in_row(self.priority, self.rows.row, len(self.rows.params))


def _priority(proposal: Proposal, rows: StepRows) -> Tensor:
    """What ranks the positions of a row, highest first."""
    priority = proposal.score
    from_left = rows.with_policy("sequential")
    if from_left is not None:
        priority = torch.where(from_left, -rows.position.double(), priority)
    shuffled = rows.with_policy("random")
    heated = rows.where(lambda p: p.policy in DREAM_POLICIES and p.alg_temp > 0)
    if shuffled is None and heated is None:
        return priority
    seeds = rows.per_position(rows.seeds, torch.int64)
    order = uniform(seeds, rows.position, "order").squeeze(-1)
    if shuffled is not None:
        priority = torch.where(shuffled, order, priority)
    if heated is not None:
        # Gumbel top-k draws without replacement from softmax(score / alg_temp).
        alg_temp = rows.per_position([p.alg_temp or 1.0 for p in rows.params])
        priority = torch.where(heated, proposal.score / alg_temp + gumbel_of(order), priority)
    return priority


def _within_quota(ranking: Ranking, rows: StepRows) -> Tensor:
    """As many masked positions as the schedule has."""
    return (ranking.rank < rows.per_position(rows.quotas, torch.int64)) & rows.masked


def _unlike_plan(proposal: Proposal, rows: StepRows) -> Tensor:
    """Masks among the positions that stay, which are the surest as far as the schedule goes, and
    written positions among the others. All compete by what would be written there now."""
    rank = rank_in_row(proposal.score, rows.row, len(rows.params))
    stays = rank < rows.per_position(rows.quotas, torch.int64)
    return stays == rows.masked


def _sure(proposal: Proposal, _: Ranking, rows: StepRows) -> Tensor:
    """Masked positions that reach the threshold."""
    threshold = rows.per_position([p.threshold for p in rows.params])
    reaches = proposal.confidence >= threshold
    strict = rows.where(lambda p: p.strict_threshold or p.policy in STRICT_POLICIES)
    if strict is not None:
        reaches = torch.where(strict, proposal.confidence > threshold, reaches)
    return reaches & rows.masked


def _sure_or_due(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """Those that exceed the threshold, or as many as the schedule has if they are fewer."""
    sure = _sure(proposal, ranking, rows)
    count = torch.zeros(len(rows.params), dtype=torch.int64, device=rows.row.device)
    count = count.index_add(0, rows.row, sure.long())[rows.row]
    enough = count >= rows.per_position(rows.quotas, torch.int64)
    return torch.where(enough, sure, _within_quota(ranking, rows))


def _sure_or_better(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """Those that exceed the threshold, and written ones whose candidate is another, sure token."""
    least = rows.per_position([p.edit_threshold for p in rows.params])
    better = (proposal.confidence > least) & (proposal.token != rows.written)
    return _sure(proposal, ranking, rows) | (better & ~rows.masked)


def _near_anchor(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """Sure positions, and masked ones near them in their row that reach the lower threshold."""
    anchor = _sure(proposal, ranking, rows)
    radius = rows.per_position([p.radius for p in rows.params], torch.int64)
    lower = rows.per_position([p.neighbour_threshold for p in rows.params])
    near = _distance_to(anchor, rows) <= radius
    return anchor | (near & (proposal.confidence >= lower) & rows.masked)


def _distance_to(anchor: Tensor, rows: StepRows) -> Tensor:
    """How far each position is from the nearest of its row's anchors; huge where there is none:
    int64 [positions]. Memory grows with the positions, not with their pairs."""
    far = torch.iinfo(torch.int64).max // 4
    line = rows.row * (far // len(rows.lengths)) + rows.position  # rows lie far apart on it
    left = line - torch.where(anchor, line, -far).cummax(0).values
    right = torch.where(anchor, line, 2 * far).flip(0).cummin(0).values.flip(0) - line
    return torch.minimum(left, right)


def _within_limit(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """APD without an auxiliary model: sure positions, no more than it commits at once."""
    least = [APD_CONFIDENCE if p.apd_threshold is None else p.apd_threshold for p in rows.params]
    return _within_quota(ranking, rows) & (proposal.confidence >= rows.per_position(least))


def _within_factor(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """The leading run of most confident positions with (n + 1) * (1 - confidence_n) < factor.

    As in Fast-dLLM's published code, the least confident position is let through when it is the
    only one that fails.
    """
    factor = rows.per_position([p.factor for p in rows.params])
    rank, masked = ranking.rank, rows.masked
    failing = (proposal.confidence < 1 - factor / (rank + 2)) & (rank > 0) & masked
    masks = torch.zeros(len(rows.params), dtype=torch.int64, device=rank.device)
    masks = masks.index_add(0, rows.row, masked.long())
    failures = torch.where(failing, rank, len(rank))
    first_failure = masks.scatter_reduce(0, rows.row, failures, "amin")
    first_failure = torch.where(first_failure == masks - 1, masks, first_failure)
    return (rank < first_failure[rows.row]) & masked


def _within_entropy(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """The positions of least entropy whose entropies, but for the largest, sum to the bound."""
    bound = rows.per_position([p.entropy_bound for p in rows.params])
    return (_entropy_of_surer(proposal, ranking, rows) <= bound) & rows.masked


def _below_entropy_sum(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """The positions of least entropy whose entropies together stay below the bound."""
    bound = rows.per_position([p.entropy_bound for p in rows.params])
    together = _entropy_of_surer(proposal, ranking, rows) - proposal.score
    return (together < bound) & rows.masked


def _entropy_of_surer(proposal: Proposal, ranking: Ranking, rows: StepRows) -> Tensor:
    """The summed entropies of the positions of a row that rank before each."""
    order = torch.argsort(rows.row * len(rows.row) + ranking.rank)
    ranked = -proposal.score[order]
    before = ranked.cumsum(0) - ranked
    starts = torch.searchsorted(rows.row, rows.row)
    surer = torch.empty_like(before)
    surer[order] = before - before[starts]
    return surer


Rule = Callable[[Proposal, Ranking, StepRows], Tensor]
_RULES: tuple[tuple[tuple[Policy, ...], Rule], ...] = (
    (("threshold", "credit"), _sure),
    (("dynamic",), _sure_or_due),
    (("edit",), _sure_or_better),
    (("local",), _near_anchor),
    (("apd",), _within_limit),
    (("factor",), _within_factor),
    (("entropy_bound",), _within_entropy),
    (("entropy_sum",), _below_entropy_sum),
)
"""What a step commits beside the surest masked position, from candidates and ranks in the row."""


def _break_ties_as_topk(accept: Tensor, priority: Tensor, rows: StepRows, i: int) -> None:
    """Choose row `i`'s positions by `torch.topk` over its canvas, as LLaDA's loop does.

    Positions whose candidate is a suppressed end token all have confidence 0; which of these equals
    goes first is decided by topk's own order, so that is what gives the published results.
    """
    own = rows.host_places([row == i for row in range(len(rows.params))])
    here = to_device(own, accept.device)
    canvas = torch.full((rows.lengths[i],), -torch.inf, device=priority.device)
    canvas[rows.position[here]] = priority[here].float()
    chosen = canvas.topk(min(rows.quotas[i], len(own))).indices
    is_chosen = torch.zeros_like(canvas, dtype=torch.bool).index_fill_(0, chosen, True)
    accept[here] = is_chosen[rows.position[here]]


def rank_in_row(priority: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Rank of each position among its row's, 0 for the highest priority; ties go to the left.

    Args:
        priority: [positions].
        row: int64 [positions], ascending.
    """
    order = priority.argsort(descending=True, stable=True)
    place = torch.arange(len(row), device=row.device)
    if num_rows > 1:
        order = order[row[order].argsort(stable=True)]
        place -= _least_in_row(place, row, num_rows)
    rank = torch.empty_like(place)
    rank[order] = place
    return rank


def first_in_row(priority: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Which positions have rank 0: bool [positions]. The arguments are those of `rank_in_row`."""
    highest = priority.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, priority, "amax")
    place = torch.arange(len(row), device=row.device)
    highest_places = torch.where(priority == highest.index_select(0, row), place, len(row))
    return place == _least_in_row(highest_places, row, num_rows)


def _least_in_row(places: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The least of the places of each position's row: int64 [positions]."""
    least = places.new_full((num_rows,), len(row)).scatter_reduce(0, row, places, "amin")
    return least.index_select(0, row)
