"""From the rows of a step to the sampler's tables, and from what it gives back to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff_kserve.engine.grammar_rows import GrammarRow
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.row_kinds import RevisingRow
from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler import (
    AllowedTokens,
    ConstrainedRow,
    ConstraintTable,
    Evidence,
    Logprobs,
    StepRows,
    TokenRules,
)


@dataclass(frozen=True)
class OpenPositions:
    """The positions that the rows of a step may write.

    Attributes:
        of_rows: int64 [n] each, as `Row.open_positions` gives them.
        counts: how many each row has.
        row: int64 [positions], the row of each.
        joined: int64 [positions], one row's after the other's.
    """

    of_rows: Sequence[NDArray[np.int64]]
    counts: list[int]
    row: Tensor
    joined: Tensor

    @classmethod
    def of(cls, of_rows: Sequence[NDArray[np.int64]]) -> OpenPositions:
        """Those of each row, side by side."""
        counts = [len(positions) for positions in of_rows]
        row = torch.from_numpy(np.arange(len(counts)).repeat(counts))
        return cls(of_rows, counts, row, torch.from_numpy(np.concatenate(of_rows)))


def table_of(
    rows: Sequence[Row], opened: OpenPositions, vocab_size: int, device: torch.device
) -> StepRows:
    """The open positions of all rows, and what each row asks."""
    standing = torch.full_like(opened.joined, -1)
    for i, row in enumerate(rows):
        if isinstance(row, RevisingRow):
            standing[opened.row == i] = torch.from_numpy(row.written_at(opened.of_rows[i]))
    row_of, position, written = to_device(
        torch.stack([opened.row, opened.joined, standing]), device
    )
    return StepRows(
        row=row_of,
        position=position,
        written=written,
        params=[row.step_params for row in rows],
        seeds=[row.step_seed for row in rows],
        quotas=[row.quota for row in rows],
        lengths=[len(row) for row in rows],
        constraints=constraints_of(rows, opened, vocab_size, device),
        allowed=_allowed(rows, vocab_size, device),
        host_row=opened.row,
        targets=_targets(rows, opened, device),
    )


def constraints_of(
    rows: Sequence[Row], opened: OpenPositions, vocab_size: int, device: torch.device
) -> ConstraintTable | None:
    """What rows ask of their tokens; None when none does."""
    asking = []
    for i, (row, positions) in enumerate(zip(rows, opened.of_rows, strict=True)):
        asked = row.params.constraints
        if asked is None:
            continue
        if row.token_rules is None:
            row.token_rules = TokenRules.of(asked, row.request.prompt_ids, vocab_size, device)
        asking.append(
            ConstrainedRow(
                i,
                asked,
                row.token_rules,
                row.prompt_length,
                row.written_answer,
                torch.from_numpy(positions),
            )
        )
    return ConstraintTable.of(asking, len(rows), device)


def _allowed(rows: Sequence[Row], vocab_size: int, device: torch.device) -> AllowedTokens | None:
    """What grammars let stand at the frontiers of rows that follow one; None when none does."""
    following = [(i, row) for i, row in enumerate(rows) if isinstance(row, GrammarRow)]
    if not following:
        return None
    places, tokens = zip(*[row.next_allowed(vocab_size) for _, row in following], strict=True)
    return AllowedTokens(
        row=to_device(torch.tensor([i for i, _ in following]), device),
        position=to_device(torch.tensor(places), device),
        allowed=to_device(torch.stack(tokens), device),
    )


def _targets(rows: Sequence[Row], opened: OpenPositions, device: torch.device) -> Tensor | None:
    """Tokens that rows want to be told of in place of candidates, -1 for none; None when no row
    scores anything."""
    given = [row.targets(positions) for row, positions in zip(rows, opened.of_rows, strict=True)]
    if all(each is None for each in given):
        return None
    targets = [
        torch.full((len(positions),), -1) if each is None else each
        for each, positions in zip(given, opened.of_rows, strict=True)
    ]
    return to_device(torch.cat(targets), device)


def evidence_of(
    rows: Sequence[Row], opened: OpenPositions, device: torch.device
) -> Evidence | None:
    """What earlier steps of the rows' blocks left behind at their open positions; None when no row
    keeps any."""
    if all(row.params.policy != "credit" for row in rows):
        return None
    return Evidence.join(
        [
            Evidence.none(len(positions), device)
            if row.evidence is None
            else row.evidence.part(to_device(torch.from_numpy(positions - row.block_start), device))
            for row, positions in zip(rows, opened.of_rows, strict=True)
        ]
    )


def keep_evidence(
    rows: Sequence[Row], opened: OpenPositions, evidence: Evidence
) -> list[Evidence | None]:
    """Each row's part of a step's evidence, laid out over its whole block; None for rows that keep
    none."""
    kept: list[Evidence | None] = []
    start = 0
    for row, positions in zip(rows, opened.of_rows, strict=True):
        own = evidence.part(slice(start, start + len(positions)))
        start += len(positions)
        if row.params.policy != "credit":
            kept.append(None)
            continue
        shape = (row.block_end - row.block_start, own.token.shape[1])
        block = Evidence(own.token.new_zeros(shape), own.credit.new_zeros(shape))
        places = to_device(torch.from_numpy(positions - row.block_start), own.token.device)
        block.token[places], block.credit[places] = own.token, own.credit
        kept.append(block)
    return kept


def logprobs_by_row(
    told: Logprobs, rows: Sequence[Row], accepted: Sequence[Tensor]
) -> list[Logprobs | None]:
    """The log probabilities of what each row writes; None for those that did not ask.

    Args:
        told: of the open positions of the rows that asked.
        accepted: bool [n] each, which of a row's open positions are written.
    """
    found: list[Logprobs | None] = []
    start = 0
    for row, yes in zip(rows, accepted, strict=True):
        if row.params.top_logprobs is None:
            found.append(None)
            continue
        found.append(told.part(slice(start, start + len(yes))).part(yes))
        start += len(yes)
    return found
