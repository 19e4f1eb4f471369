"""Penalties for the tokens that a row's text has already.

The tables hold these tokens and no others: beside the vocabulary they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler.params import Constraints
from vdiff_kserve.sampler.step import StepRows
from vdiff_kserve.sampler.token_rules import ConstrainedRow, slots_of


@dataclass(frozen=True)
class Penalties:
    """The penalties of a step's rows, for the tokens that their texts have and no others.

    Attributes:
        has: which rows of the step have any.
        slot: int64 [rows of the step], where a row's are in the tables; 0 for the others.
        strength: float32 [slots, 3], repetition, frequency and presence.
        token: int64 [slots, most], distinct, then filled up with 0.
        count: float32 [slots, most], how often the answer has the token; 0 where filled up.
        in_prompt: bool [slots, most]; False where filled up.
        counted_end: int64 [slots], canvas position where the counting ends.
    """

    has: Sequence[bool]
    slot: Tensor
    strength: Tensor
    token: Tensor
    count: Tensor
    in_prompt: Tensor
    counted_end: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[ConstrainedRow], num_rows: int, device: torch.device
    ) -> Penalties | None:
        """The tables of a step; None when no row has penalties."""
        found = {row.row: row for row in rows if row.constraints.penalizes}
        if not found:
            return None
        texts = [_text(row) for row in found.values()]
        most = max(1, *(len(text.token) for text in texts))
        numbers = torch.stack([text.filled_up(most) for text in texts], dim=1)
        token, count, in_prompt = to_device(numbers, device)
        ends = torch.tensor([text.counted_end for text in texts])
        strength = torch.tensor([_strength(row.constraints) for row in found.values()])
        return cls(
            has=[i in found for i in range(num_rows)],
            slot=slots_of(found, num_rows, token),
            strength=to_device(strength, device),
            token=token,
            count=count.float(),
            in_prompt=in_prompt.bool(),
            counted_end=to_device(ends, device),
        )


@dataclass(frozen=True)
class _Text:
    """The tokens of a row's text that matter for penalties: int64 [n] each, and its end."""

    token: Tensor
    count: Tensor
    in_prompt: Tensor
    counted_end: int

    def filled_up(self, length: int) -> Tensor:
        """int64 [3, length]."""
        tokens = torch.zeros(3, length, dtype=torch.int64)
        tokens[:, : len(self.token)] = torch.stack([self.token, self.count, self.in_prompt])
        return tokens


def _text(row: ConstrainedRow) -> _Text:
    counted, prompt = _counted(row), row.rules.in_prompt
    held, count = counted[counted >= 0].unique(return_counts=True)
    only_prompt = prompt[~torch.isin(prompt, held)]
    return _Text(
        token=torch.cat([held, only_prompt]),
        count=torch.cat([count, torch.zeros_like(only_prompt)]),
        in_prompt=torch.cat([torch.isin(held, prompt).long(), torch.ones_like(only_prompt)]),
        counted_end=row.first + len(counted),
    )


def _counted(row: ConstrainedRow) -> Tensor:
    """The answer as far as it counts, up to the first end token: int64 [n]."""
    ends = torch.isin(row.answer, torch.tensor(row.constraints.end_token_ids)).nonzero()
    return row.answer[: int(ends[0])] if len(ends) else row.answer


def _strength(constraints: Constraints) -> tuple[float, float, float]:
    return (
        constraints.repetition_penalty,
        constraints.frequency_penalty,
        constraints.presence_penalty,
    )


def penalize(logits: Tensor, penalties: Penalties, rows: StepRows) -> None:
    """Change the logits of the tokens that the text has; a position's own written token, if any,
    does not count."""
    places = to_device(rows.host_places(penalties.has), logits.device)
    slots = penalties.slot[rows.row[places]]
    token = penalties.token[slots]  # [positions, most]
    counted = rows.position[places] < penalties.counted_end[slots]
    own = torch.where(counted, rows.written[places], -1)
    count = penalties.count[slots]
    count = count - ((token == own[:, None]) & (count > 0)).float()
    known = (count > 0) | penalties.in_prompt[slots]
    repetition, frequency, presence = penalties.strength[slots].T[..., None]
    index = places[:, None], token.clamp(max=logits.shape[-1] - 1)
    before = logits[index]
    repeated = torch.where(before > 0, before / repetition, before * repetition)
    after = torch.where(known, repeated, before) - frequency * count - presence * (count > 0)
    # Added, since a token may stand there a second time to fill up; what is impossible stays so.
    moot = before.isinf() | (token >= logits.shape[-1])
    logits.index_put_(index, (after - before).masked_fill(moot, 0.0), accumulate=True)
