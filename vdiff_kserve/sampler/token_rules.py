"""What a request asks of its tokens, as the sampler is told of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler.params import Constraints


@dataclass(frozen=True)
class TokenRules:
    """The part of a request's constraints that never changes.

    Attributes:
        bias: float32 [vocab], added to every logit: the logit bias, and -inf for a token that must
            stand nowhere; None when there is none of either.
        in_prompt: int64 [n] on the host, the prompt's tokens, ascending; empty without a repetition
            penalty.
    """

    bias: Tensor | None
    in_prompt: Tensor

    @classmethod
    def of(
        cls, constraints: Constraints, prompt: Sequence[int], vocab_size: int, device: torch.device
    ) -> TokenRules:
        """The rules of one request."""
        in_prompt = torch.zeros(0, dtype=torch.int64)
        if constraints.repetition_penalty != 1:
            in_prompt = torch.tensor(prompt, dtype=torch.int64).unique()
        return cls(_bias_of(constraints, vocab_size, device), in_prompt)


def _bias_of(constraints: Constraints, vocab_size: int, device: torch.device) -> Tensor | None:
    banned = [word[0] for word in constraints.bad_words if len(word) == 1]
    if constraints.allowed_token_ids is None and not banned and not constraints.logit_bias:
        return None
    bias = torch.zeros(vocab_size)
    if constraints.allowed_token_ids is not None:
        bias.fill_(-torch.inf)
        bias[list(constraints.allowed_token_ids)] = 0.0
    bias[banned] = -torch.inf
    if constraints.logit_bias:
        biased, values = zip(*constraints.logit_bias, strict=True)
        bias.index_add_(0, torch.tensor(biased), torch.tensor(values, dtype=bias.dtype))
    return to_device(bias, device)


@dataclass(frozen=True)
class ConstrainedRow:
    """One row that asks for something, as a step finds it.

    Attributes:
        row: its number in the step.
        first: canvas position of its answer's first token.
        answer: int64 [answer], the committed tokens; -1 for a mask.
        opened: int64 [n], its open positions in the canvas, ascending.
    """

    row: int
    constraints: Constraints
    rules: TokenRules
    first: int
    answer: Tensor
    opened: Tensor


def slots_of(rows: Collection[int], num_rows: int, table: Tensor) -> Tensor:
    """Where the table of each row of the step is: int64 [rows], beside `table`."""
    slot = torch.zeros(num_rows, dtype=torch.int64)
    slot[list(rows)] = torch.arange(len(rows))
    return to_device(slot, table.device)
