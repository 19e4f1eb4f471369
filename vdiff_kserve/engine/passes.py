"""The forward passes that the rows of a step need, and which rows can share one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vdiff_kserve.engine.row import Row
from vdiff_kserve.models import RowSpan

MOST_BLOCKS = 16
"""Of a pass that is taken apart. A block by itself is as long as a row's pass is in most steps, so
that both can be captured as one."""


class Pass(NamedTuple):
    """One forward pass over a canvas of a row: its own, or the one without a prompt that guidance
    compares it with."""

    row: Row
    without_prompt: bool
    canvas: Tensor
    span: RowSpan

    @property
    def place(self) -> int:
        """Where its keys and values lie in the cache; -1 when they are in none."""
        return -1 if self.span.cache_offset is None else self.span.cache_offset

    def by_block(self, block: int) -> list[Pass]:
        """The same as a pass for each block of `block` positions, for a model whose blocks see
        themselves and all to their left; itself when it is not over a few whole blocks, of which
        the last one's hidden states are wanted. They are computed together: each layer keeps all
        keys and values before it attends."""
        span, starts = self.span, range(self.span.start, self.span.keys, block)
        last = RowSpan(starts[-1], block, span.keys, starts[-1], block, span.cache_offset)
        wanted = span.output_start, span.outputs
        if (
            span.cache_offset is None
            or span.start % block
            or span.keys % block
            or wanted != (last.output_start, last.outputs)
            or len(starts) > MOST_BLOCKS
        ):
            return [self]
        return [
            self._replace(span=last._replace(start=start, keys=start + block, output_start=start))
            for start in starts
        ]


def passes_of(rows: Sequence[tuple[Row, RowSpan]], mask_token_id: int | None) -> list[Pass]:
    """The passes of rows over the given parts of their canvases: a guided row has a second one,
    whose prompt is masked, behind its own."""
    passes = []
    for row, span in rows:
        passes.append(Pass(row, False, row.canvas, span))
        if row.params.cfg_scale > 0:
            canvas = row.canvas.clone()
            assert mask_token_id is not None, "guidance masks the prompt"
            canvas[: row.prompt_length] = mask_token_id
            offset = row.cache_offsets[1] if row.cache_offsets else None
            passes.append(Pass(row, True, canvas, span._replace(cache_offset=offset)))
    return passes


def by_blocks(passes: Sequence[Pass], block: int, most: int) -> list[Pass]:
    """Passes with those over a few blocks taken apart, the first ones first, as long as there are
    no more than `most`."""
    apart: list[Pass] = []
    for i, each in enumerate(passes):
        parts, later = each.by_block(block), len(passes) - i - 1
        apart += parts if len(apart) + len(parts) + later <= most else [each]
    return apart


def twins_of(rows: Sequence[Row], spans: Sequence[RowSpan]) -> dict[Row, Row]:
    """Rows whose first pass is that of an earlier row: the choices of one request. They differ in
    their seeds only, and so not before the first step is sampled."""
    twins: dict[Row, Row] = {}
    leaders: dict[tuple[object, ...], Row] = {}
    for row, span in zip(rows, spans, strict=True):
        if not row.is_fresh or row.begun_pass is not None or row.cached_tokens:
            continue
        guided = row.params.cfg_scale > 0
        shape = span._replace(cache_offset=None)
        same = (*row.first_canvas, len(row), shape, guided, len(row.cache_offsets))
        leader = leaders.setdefault(same, row)
        if leader is not row:
            twins[row] = leader
    return twins
