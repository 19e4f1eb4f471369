"""Adaptive Parallel Decoding (Israel et al., arXiv 2506.00413): checking a draft left to right."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff_kserve.sampler.noise import gumbel
from vdiff_kserve.sampler.step import StepRows, filter_tokens


def mixture_logits(diffusion: Tensor, auxiliary: Tensor, rows: StepRows) -> Tensor:
    """Logits of the target `p_diffusion^R * p_AR^(1 - R)`, renormalized by a softmax.

    At temperatures above 0 both distributions are tempered, and p_diffusion is the filtered one
    that the draft was sampled from. At temperature 0 the logits are as they are.

    Args:
        diffusion: [positions, vocab], logits of the diffusion model.
        auxiliary: [positions, auxiliary vocab], logits of the causal model given the draft so far.

    Returns:
        float64 [positions, the smaller vocab].
    """
    params = rows.params
    temperature = rows.per_position([p.temperature or 1.0 for p in params])[:, None]
    size = min(diffusion.shape[-1], auxiliary.shape[-1])
    proposal = filter_tokens(
        diffusion.double() / temperature,
        top_k=rows.unless_all([p.top_k if p.temperature else 0 for p in params], 0, torch.int64),
        top_p=rows.unless_all([p.top_p if p.temperature else 1.0 for p in params], 1.0),
        min_p=rows.unless_all([p.min_p if p.temperature else 0.0 for p in params], 0.0),
    )[:, :size]
    weight = rows.per_position([p.apd_mixture_weight for p in params])[:, None]
    check = auxiliary[:, :size].double() / temperature
    from_diffusion = torch.where(weight > 0, weight * proposal, 0.0)
    return from_diffusion + torch.where(weight < 1, (1 - weight) * check, 0.0)


def target_tokens(mixture: Tensor, rows: StepRows) -> Tensor:
    """Samples of the target with the noise that the draft was sampled with: int64 [positions].

    Sharing the noise (a universal coupling) makes draft and target agree as often as possible. At
    temperature 0 the sample is the arg max.
    """
    sampled = rows.where(lambda p: p.temperature > 0)
    if sampled is None:
        return mixture.argmax(dim=-1)
    seeds = rows.per_position(rows.seeds, torch.int64)
    noise = gumbel(seeds, rows.position, mixture.shape[-1])
    return (mixture + noise * sampled[:, None]).argmax(dim=-1)


def verify(draft: Tensor, diffusion: Tensor, auxiliary: Tensor, rows: StepRows) -> Tensor:
    """The accepted part of each row's draft: bool [positions], a run from the row's first position.

    A position is accepted when the target's sample is the drafted token, its probability under the
    target reaches `apd_threshold`, and all before it were accepted. The first always is.

    Args:
        draft: int64 [positions], consecutive positions of each row from its frontier on.
        diffusion: [positions, vocab].
        auxiliary: [positions, auxiliary vocab].
    """
    mixture = mixture_logits(diffusion, auxiliary, rows)
    agrees = target_tokens(mixture, rows) == draft
    probability = mixture.softmax(dim=-1).gather(
        -1, draft.clamp(max=mixture.shape[-1] - 1)[:, None]
    )
    least = rows.per_position([p.apd_threshold or 0.0 for p in rows.params])
    first = torch.ones_like(agrees)
    first[1:] = rows.row[1:] != rows.row[:-1]
    accepted = first | (agrees & (probability.squeeze(-1) >= least))
    return leading_run(accepted, rows.row)


def leading_run(accepted: Tensor, row: Tensor) -> Tensor:
    """Accepted positions that have only accepted ones of their row to their left."""
    rejections = (~accepted).long().cumsum(0)
    starts = torch.searchsorted(row, row)
    before_row = rejections[starts] - (~accepted[starts]).long()
    return rejections == before_row
