"""Small batches of rows for the sampler's functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from vdiff_kserve.sampler import (
    DecodingParams,
    Policy,
    Proposal,
    SpecialTokens,
    StepRows,
    propose,
    select,
)

VOCAB = 12
SPECIAL = SpecialTokens(mask=11, eos=10, eot=9)
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class OpenRow:
    """One row's part of a step.

    Attributes:
        positions: canvas positions, ascending.
        written: the tokens there, -1 for a mask.
        logits: float32 [positions, vocab].
    """

    params: DecodingParams
    positions: tuple[int, ...]
    written: tuple[int, ...]
    logits: Tensor
    quota: int = 1

    @property
    def masks(self) -> list[bool]:
        return [token < 0 for token in self.written]


def row_of(logits: Tensor, params: DecodingParams, *, first: int = 3, quota: int = 1) -> OpenRow:
    """A row whose positions are all masks, side by side."""
    count = len(logits)
    return OpenRow(params, tuple(range(first, first + count)), (-1,) * count, logits, quota)


def step_rows(rows: list[OpenRow]) -> StepRows:
    """The batch, on `TEST_DEVICE`."""
    counts = torch.tensor([len(row.positions) for row in rows])
    row_of_each = torch.arange(len(rows)).repeat_interleave(counts)
    return StepRows(
        row=row_of_each.to(TEST_DEVICE),
        position=torch.tensor([p for row in rows for p in row.positions]).to(TEST_DEVICE),
        written=torch.tensor([token for row in rows for token in row.written]).to(TEST_DEVICE),
        params=[row.params for row in rows],
        seeds=[row.params.seed for row in rows],
        quotas=[row.quota for row in rows],
        lengths=[row.positions[-1] + 5 for row in rows],
        host_row=row_of_each,
    )


def propose_rows(rows: list[OpenRow]) -> tuple[Proposal, StepRows]:
    """The candidates and the batch, on `TEST_DEVICE`."""
    logits = torch.cat([row.logits for row in rows]).to(TEST_DEVICE, copy=True)
    batch = step_rows(rows)
    return propose(logits, batch, SPECIAL), batch


def proposal_of(*rows: OpenRow) -> Proposal:
    """The candidates, on the host."""
    proposal, _ = propose_rows(list(rows))
    return Proposal(proposal.token.cpu(), proposal.confidence.cpu(), proposal.score.cpu())


@dataclass(frozen=True)
class Outcome:
    """What one step decides for one row."""

    accept: tuple[bool, ...]
    tokens: tuple[int, ...]


def step(rows: list[OpenRow]) -> list[Outcome]:
    """Propose and select for a batch, row by row."""
    proposal, batch = propose_rows(rows)
    counts = [len(row.positions) for row in rows]
    accepts, tokens = select(proposal, batch).split(counts), proposal.token.split(counts)
    return [
        Outcome(tuple(accept.tolist()), tuple(token.tolist()))
        for accept, token in zip(accepts, tokens, strict=True)
    ]
