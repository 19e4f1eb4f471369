"""How many tokens each step of a block commits."""

from __future__ import annotations

from vdiff_kserve.sampler.params import DecodingParams


def block_steps(params: DecodingParams, answer_length: int, block_length: int) -> int:
    """Steps that a block of `block_length` of the answer's tokens gets.

    `params.steps` is for the whole answer and is shared out by length, so a short last block gets
    its part; with equal blocks this is LLaDA's `steps // blocks`.
    """
    if params.steps is None:
        return block_length
    return max(1, round(params.steps * block_length / answer_length))


def quota(masks: int, steps: int, step: int) -> int:
    """Tokens that step number `step` (from 0) of a block commits: LLaDA's `get_num_transfer_tokens`.

    Args:
        masks: masked positions when the block began.
        steps: steps of the block; the remainder of masks / steps goes to the first ones.
    """
    return masks // steps + (step < masks % steps)
