"""Evidence from earlier steps (CreditDecoding, arXiv 2510.06133)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.sampler.step import StepRows


@dataclass(frozen=True)
class Evidence:
    """Credit that tokens earned by being the most likely one at a position.

    Only tokens that ever were are kept, so it is small beside the vocabulary.

    Attributes:
        token: int64 [positions, kept].
        credit: float32 [positions, kept]; 0 where nothing is kept.
    """

    token: Tensor
    credit: Tensor

    @classmethod
    def none(cls, positions: int, device: torch.device) -> Evidence:
        """No evidence yet."""
        empty = torch.zeros(positions, 0, device=device)
        return cls(empty.long(), empty)

    @classmethod
    def join(cls, parts: list[Evidence]) -> Evidence:
        """The parts' positions one after the other, padded to the same number of kept tokens."""
        kept = max(part.token.shape[1] for part in parts)

        def pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, kept - x.shape[1]))

        return cls(
            torch.cat([pad(part.token) for part in parts]),
            torch.cat([pad(part.credit) for part in parts]),
        )

    def part(self, index: slice | Tensor) -> Evidence:
        """The evidence of some positions."""
        return Evidence(self.token[index], self.credit[index])


def accumulate(evidence: Evidence, logits: Tensor, rows: StepRows) -> Evidence:
    """Let old credit fade and give the most likely token of each position its own.

    Args:
        logits: [positions, vocab].
    """
    probability, token = logits.float().softmax(dim=-1).max(dim=-1)
    decay = rows.per_position([p.credit_decay for p in rows.params]).float()
    power = rows.per_position([p.credit_power for p in rows.params]).float()
    earned = probability**power
    faded = evidence.credit * decay[:, None]
    known = (evidence.token == token[:, None]) & (evidence.credit > 0)
    credit = faded + known * earned[:, None]
    fresh = torch.where(known.any(dim=-1), 0.0, earned)
    return Evidence(
        torch.cat([evidence.token, token[:, None]], dim=-1),
        torch.cat([credit, fresh[:, None]], dim=-1),
    )


def fuse(logits: Tensor, evidence: Evidence, rows: StepRows) -> Tensor:
    """Add `weight * log(credit + 1)` to the logits of rows whose policy is `credit`."""
    weight = rows.per_position(
        [p.credit_weight if p.policy == "credit" else 0.0 for p in rows.params]
    )
    bonus = weight.float()[:, None] * (evidence.credit + 1).log()
    return logits.float().scatter_add(-1, evidence.token, bonus)
