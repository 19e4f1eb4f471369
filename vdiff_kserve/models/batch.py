"""What one forward pass computes: packed query tokens of many rows, and which of them are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Rows of different lengths laid end to end, without padding.

    Attributes:
        input_ids: int64 [tokens], the rows' tokens one row after the other.
        positions: int64 [tokens], each token's position in its own row (for rotary embedding).
        lengths: tokens of each row; they sum to `tokens`.
        output_spans: per row, (first token, count) relative to the row: the only tokens whose
            final hidden states are returned. None returns all of them.
    """

    input_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    output_spans: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def pack(
        cls,
        rows: list[Tensor],
        output_spans: list[tuple[int, int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """Lay whole rows (int64 [length] each, positions from 0) end to end on `device`."""
        lengths = tuple(len(row) for row in rows)
        positions = torch.cat([torch.arange(n) for n in lengths])
        spans = None if output_spans is None else tuple(output_spans)
        return cls(torch.cat(rows).to(device), positions.to(device), lengths, spans)

    @classmethod
    def dense(cls, input_ids: Tensor) -> ForwardBatch:
        """A batch of equally long rows, int64 [rows, length]; every hidden state is returned."""
        rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).repeat(rows)
        return cls(input_ids.reshape(-1), positions, (length,) * rows)

    @cached_property
    def output_lengths(self) -> tuple[int, ...]:
        """Number of returned hidden states of each row."""
        if self.output_spans is None:
            return self.lengths
        return tuple(count for _, count in self.output_spans)

    @cached_property
    def output_tokens(self) -> Tensor | None:
        """int64 [outputs], indices into the packed tokens; None when all are returned."""
        if self.output_spans is None:
            return None
        pieces, row_start = [], 0
        for length, (first, count) in zip(self.lengths, self.output_spans, strict=True):
            pieces.append(torch.arange(row_start + first, row_start + first + count))
            row_start += length
        return torch.cat(pieces).to(self.input_ids.device)


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of one shape: `rows` x `queries` query tokens over `keys` key tokens."""

    rows: int
    queries: int
    keys: int


def group_rows(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> list[RowGroup]:
    """Merge neighbouring rows of equal shape, so that each group is one attention call."""
    shapes = zip(query_lengths, key_lengths, strict=True)
    return [RowGroup(len(list(rows)), *shape) for shape, rows in groupby(shapes)]
