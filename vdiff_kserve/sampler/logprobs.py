"""Log probabilities of committed tokens, as the model alone sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.sampler.params import MAX_TOP_LOGPROBS
from vdiff_kserve.sampler.step import StepRows


@dataclass(frozen=True)
class Logprobs:
    """What is told of some positions.

    Attributes:
        chosen: float32 [positions], log probability of the candidate.
        rank: int64 [positions], its rank among the tokens that may be written, from 1.
        top_tokens: int64 [positions, kept], the likeliest tokens, likeliest first.
        top: float32 [positions, kept], their log probabilities.
    """

    chosen: Tensor
    rank: Tensor
    top_tokens: Tensor
    top: Tensor

    @classmethod
    def join(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """The parts' positions one after the other."""
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.rank for part in parts]),
            torch.cat([part.top_tokens for part in parts]),
            torch.cat([part.top for part in parts]),
        )

    def part(self, index: slice | Tensor) -> Logprobs:
        """Some of the positions."""
        return Logprobs(
            self.chosen[index], self.rank[index], self.top_tokens[index], self.top[index]
        )

    def to_host(self) -> Logprobs:
        """The same on the CPU, without waiting for a GPU: to be looked at after a later copy from
        it has ended."""
        parts = (self.chosen, self.rank, self.top_tokens, self.top)
        return Logprobs(*(part.to("cpu", non_blocking=True) for part in parts))


def asked_logprobs(rows: StepRows) -> Tensor | None:
    """int64 [n], indices of the positions of rows that want log probabilities; None when no row
    does."""
    return rows.places(lambda p: p.top_logprobs is not None)


def raw_logprobs(logits: Tensor, rows: StepRows) -> Tensor | None:
    """The softmax before temperature, filters and constraints (vLLM's `raw_logprobs`).

    Guidance is part of it: it makes the distribution that is decoded from.

    Args:
        logits: [positions, vocab].

    Returns:
        float32 [positions of rows that ask, vocab]; None when no row asks.
    """
    asked = asked_logprobs(rows)
    return None if asked is None else logits[asked].float().log_softmax(dim=-1)


def tell(raw: Tensor, token: Tensor, rows: StepRows, mask_token: int | None) -> Logprobs:
    """What is told of the positions of rows that ask. The mask token is never among the likeliest.

    As many of these are kept whatever the rows ask for, so that a row's answer does not depend on
    its neighbours.

    Args:
        raw: what `raw_logprobs` gave for the same rows; overwritten.
        token: int64 [positions], the candidates of all positions.
    """
    chosen = raw.gather(-1, token[asked_logprobs(rows)][:, None])
    if mask_token is not None:
        raw[:, mask_token] = -torch.inf
    top, top_tokens = raw.topk(min(MAX_TOP_LOGPROBS, raw.shape[-1] - 1), dim=-1)
    return Logprobs(chosen.squeeze(-1), (raw > chosen).sum(-1) + 1, top_tokens, top)
