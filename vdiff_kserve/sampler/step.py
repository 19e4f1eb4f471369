"""One denoising step over many rows: logits -> candidate tokens -> which of them are committed.

Pure functions of tensors. All masked positions of all rows' active blocks lie in one dimension
("positions"); what differs between rows is gathered to it, so no row is ever looped over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdiff_kserve.sampler.noise import gumbel, uniform
from vdiff_kserve.sampler.params import DecodingParams


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that decoding treats apart."""

    mask: int
    eos: int
    eot: int | None


@dataclass(frozen=True)
class StepRows:
    """The rows of a step and where their masked positions are.

    Attributes:
        row: int64 [positions], the row of each position, ascending.
        position: int64 [positions], place in the row's canvas.
        params: one per row.
        quotas: tokens to commit per row in a scheduled step.
        lengths: tokens of each row's canvas.
    """

    row: Tensor
    position: Tensor
    params: Sequence[DecodingParams]
    quotas: Sequence[int]
    lengths: Sequence[int]

    def part(self, start: int, end: int) -> StepRows:
        """The same rows, with only some of the positions."""
        return replace(self, row=self.row[start:end], position=self.position[start:end])

    def per_position(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """One value per row -> one per position."""
        return torch.tensor(values, dtype=dtype, device=self.row.device)[self.row]


@dataclass(frozen=True)
class Proposal:
    """What each masked position would become.

    Attributes:
        token: int64 [positions].
        confidence: float32 [positions], probability of `token`.
    """

    token: Tensor
    confidence: Tensor

    @classmethod
    def join(cls, parts: Sequence[Proposal]) -> Proposal:
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.token for part in parts]),
            torch.cat([part.confidence for part in parts]),
        )


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance as LLaDA applies it: `u + (scale + 1) * (c - u)`.

    Args:
        conditional: [positions, vocab], logits given the prompt.
        unconditional: [positions, vocab], logits given a masked prompt.
        scale: float [positions].
    """
    return unconditional + (scale[:, None] + 1) * (conditional - unconditional)


def propose(logits: Tensor, rows: StepRows, special: SpecialTokens) -> Proposal:
    """Candidate token and confidence of every position, as LLaDA's `generate` defines them.

    The candidate is the arg max of `logits + temperature * gumbel`, so a sample of
    softmax(logits / temperature); its confidence is softmax(logits)[candidate], not tempered. The
    mask token is never a candidate.

    Args:
        logits: [positions, vocab]; overwritten.
    """
    logits = logits.float()
    params = rows.params
    if any(p.logits_eos_inf for p in params):
        chosen = rows.per_position([p.logits_eos_inf for p in params], torch.bool)
        logits[chosen, special.eos] = -torch.inf
    candidates = logits
    if any(p.temperature > 0 for p in params):
        candidates = _perturbed(logits, rows)
    masked_out = candidates[:, special.mask].clone()
    candidates[:, special.mask] = -torch.inf
    token = candidates.argmax(dim=-1)
    candidates[:, special.mask] = masked_out
    if any(p.confidence_eos_eot_inf for p in params):
        chosen = rows.per_position([p.confidence_eos_eot_inf for p in params], torch.bool)
        for end_token in (special.eos, special.eot):
            if end_token is not None:
                logits[chosen, end_token] = -torch.inf
    score = logits.gather(-1, token[:, None]).squeeze(-1)
    return Proposal(token, (score - logits.logsumexp(dim=-1)).exp())


def _perturbed(logits: Tensor, rows: StepRows) -> Tensor:
    """Logits plus `temperature * gumbel` where the temperature is above 0, filtered by top-p."""
    temperature = rows.per_position([p.temperature for p in rows.params], torch.float64)
    sampled = temperature > 0
    heat = temperature[sampled, None]
    scores = logits[sampled].double()
    top_p = rows.per_position([p.top_p for p in rows.params], torch.float64)[sampled]
    if bool((top_p < 1).any()):
        scores = keep_top_p(scores / heat, top_p) * heat
    seeds = rows.per_position([p.seed for p in rows.params], torch.int64)[sampled]
    noise = gumbel(seeds, rows.position[sampled], scores.shape[-1])
    perturbed = logits.double()
    perturbed[sampled] = scores + heat * noise
    return perturbed


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf all but the smallest set of tokens whose probability reaches `top_p`.

    Args:
        logits: [positions, vocab].
        top_p: [positions]; the token that crosses the bound is kept, so one always remains.
    """
    ranked, order = logits.sort(dim=-1, descending=True)
    probability = ranked.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    drop_ranked = before >= top_p[:, None]
    drop_ranked[:, 0] = False
    drop = torch.zeros_like(drop_ranked).scatter(-1, order, drop_ranked)
    return logits.masked_fill(drop, -torch.inf)


def select(proposal: Proposal, rows: StepRows) -> Tensor:
    """Which positions are committed: bool [positions], at least one in every row that has a quota.

    Scheduled rows commit their quota of most confident (or, with `random` remasking, random)
    positions; rows with a threshold commit all that reach it and always their best one.
    """
    params = rows.params
    priority = proposal.confidence.double()
    if any(p.remasking == "random" for p in params):
        shuffled = rows.per_position([p.remasking == "random" for p in params], torch.bool)
        seeds = rows.per_position([p.seed for p in params], torch.int64)
        order = uniform(seeds, rows.position, "order").squeeze(-1)
        priority = torch.where(shuffled, order, priority)
    rank = rank_in_row(priority, rows.row)
    scheduled = rank < rows.per_position(rows.quotas, torch.int64)
    for i, p in enumerate(params):
        if p.confidence_eos_eot_inf:
            _break_ties_as_topk(scheduled, priority, rows, i)
    if all(p.threshold is None for p in params):
        return scheduled
    thresholds = [torch.nan if p.threshold is None else p.threshold for p in params]
    threshold = rows.per_position(thresholds, torch.float64)
    confident = (proposal.confidence.double() >= threshold) | (rank == 0)
    return torch.where(threshold.isnan(), scheduled, confident)


def _break_ties_as_topk(scheduled: Tensor, priority: Tensor, rows: StepRows, i: int) -> None:
    """Choose row `i`'s positions by `torch.topk` over its canvas, as LLaDA's loop does.

    Positions whose candidate is a suppressed end token all have confidence 0; which of these equals
    goes first is decided by topk's own order, so that is what gives the published results.
    """
    here = (rows.row == i).nonzero().squeeze(-1)
    canvas = priority.new_full((rows.lengths[i],), -torch.inf)
    canvas[rows.position[here]] = priority[here]
    chosen = canvas.topk(min(rows.quotas[i], len(here))).indices
    scheduled[here] = torch.isin(rows.position[here], chosen)


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
    rank[order] = places - first_of_row[order]
    return rank
