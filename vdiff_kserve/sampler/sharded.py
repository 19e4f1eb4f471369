"""Proposals when each rank has the logits of a part of the vocabulary only.

What ranks exchange is four numbers per position instead of the logits: the best score of their
part, its token, that token's logit, and the log of the summed exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vdiff_kserve.sampler.noise import gumbel
from vdiff_kserve.sampler.params import ENTROPY_POLICIES, DecodingParams
from vdiff_kserve.sampler.step import (
    LEAST_SCORE,
    Proposal,
    SpecialTokens,
    StepRows,
    is_filtered,
)

Gather = Callable[[Tensor], Tensor]
"""What each rank has, on every rank: [...] -> [ranks, ...]."""


def can_propose_from_shards(rows: StepRows) -> bool:
    """Whether these rows' proposals need no position's whole logits."""
    return rows.allowed is None and not any(_needs_whole(p) for p in rows.params)


def _needs_whole(p: DecodingParams) -> bool:
    return (
        p.policy in ENTROPY_POLICIES
        or p.policy in ("topk_margin", "credit", "apd")
        or is_filtered(p)
        or p.constraints is not None
        or p.top_logprobs is not None
    )


def propose_from_shards(
    logits: Tensor, first: int, rows: StepRows, special: SpecialTokens, gather: Gather
) -> Proposal:
    """What `propose` gives for rows that `can_propose_from_shards`, on every rank.

    Args:
        logits: [positions, tokens of this rank]; overwritten.
        first: this rank's first token.
    """
    logits = logits.float()
    suppressed = rows.where(lambda p: p.logits_eos_inf)
    if suppressed is not None:
        _suppress(logits, special.eos - first, suppressed)
    scores = logits.double()
    if special.mask is not None:
        _suppress(scores, special.mask - first)
    _sample(scores, first, rows)
    best, own = scores.max(dim=-1)
    last = rows.where(lambda p: p.confidence_eos_eot_inf)
    if last is not None:
        for end_token in (special.eos, special.eot):
            if end_token is not None:
                _suppress(logits, end_token - first, last)
    chosen = logits.gather(-1, own[:, None]).squeeze(-1)
    told = torch.stack((best, (own + first).double(), chosen.double(), logits.logsumexp(-1)))
    best, token, chosen, total = gather(told).unbind(1)  # [ranks, positions] each
    winner = best.argmax(dim=0, keepdim=True)
    confidence = (chosen.gather(0, winner)[0] - total.logsumexp(0)).exp().nan_to_num(0.0)
    score = confidence.nan_to_num(LEAST_SCORE)
    return Proposal(token.gather(0, winner)[0].long(), confidence, score)


def _suppress(logits: Tensor, column: int, where: Tensor | None = None) -> None:
    """Set a token's logits to -inf, at some positions or at all, if the token is this rank's."""
    if not 0 <= column < logits.shape[-1]:
        return
    if where is None:
        logits[:, column] = -torch.inf
    else:
        logits[:, column].masked_fill_(where, -torch.inf)


def _sample(scores: Tensor, first: int, rows: StepRows) -> None:
    """Heat and shake the scores of rows that sample, with the noise of the whole vocabulary."""
    sampled = rows.places(lambda p: p.temperature > 0)
    if sampled is None:
        return
    drawn = replace(rows, row=rows.row[sampled], position=rows.position[sampled])
    temperature = drawn.per_position([p.temperature or 1.0 for p in rows.params])
    seeds = drawn.per_position(drawn.seeds, torch.int64)
    noise = gumbel(seeds, drawn.position, scores.shape[-1], first)
    scores[sampled] = scores[sampled] / temperature[:, None] + noise
