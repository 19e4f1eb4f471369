"""How many tokens each step of a block commits, for policies that go by schedule."""

from __future__ import annotations

import torch

from vdiff_kserve.sampler.params import DREAM_POLICIES, DecodingParams

DREAM_LAST_TIME = 1e-3
"""Time of Dream's last step (`eps` of its `diffusion_generate`)."""


def block_steps(params: DecodingParams, answer_length: int, block_length: int) -> int:
    """Steps that a block of `block_length` of the answer's tokens gets.

    `params.steps` is for the whole answer and is shared out by length, so a short last block gets
    its part; with equal blocks this is LLaDA's `steps // blocks`. A block that is longer than the
    answer, since it begins with the prompt's tail, gets no more than leave the answer's part of it
    `params.steps`.
    """
    if params.steps is None:
        return max(1, block_length)
    if block_length > answer_length:
        return max(1, params.steps * block_length // answer_length)
    return max(1, round(params.steps * block_length / answer_length))


def quota(params: DecodingParams, masks: int, left: int, steps: int, step: int) -> int:
    """Tokens that step number `step` (from 0) of a block commits, or for `p2` those that stay.

    Masks that are left when the schedule is over, since checks of a draft took steps of it, are
    written by further steps.

    Args:
        masks: masked positions when the block began.
        left: masked positions now; only Dream's policies look at it.
        steps: steps of the block.
    """
    if params.policy in DREAM_POLICIES:
        return _dream_quota(left, steps, step)
    if params.policy == "p2":
        return masks - _masked_again(masks, steps, step)
    share = masks // steps + (step < masks % steps)
    return share if step < steps else max(1, share)


def _masked_again(masks: int, steps: int, step: int) -> int:
    """Positions that are masked after a step: the part of the steps that is left, in float32 and
    cut off as in Open-dLLM's `diffusion_generate`, since rounding decides counts."""
    return max(0, int(torch.tensor(float(masks)) * (1 - (step + 1) / steps)))


def _dream_quota(left: int, steps: int, step: int) -> int:
    """Dream's share: masks times the part of the remaining time that the step takes.

    Computed in float32 and cut off as `diffusion_generate` does, since rounding decides counts.
    """
    if step >= steps - 1:
        return left
    times = torch.linspace(1, DREAM_LAST_TIME, steps + 1)
    return int(torch.tensor(left) * (1 - times[step + 1] / times[step]))
