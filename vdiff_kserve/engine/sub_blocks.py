"""Rows of models whose blocks begin with a token predicted from the block before (Fast-dLLM v2)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vdiff_kserve.engine.request import EventSink, FinishReason, GenerationRequest
from vdiff_kserve.engine.row import Decision, PassKind, Row
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.sampler import DecodingParams, block_steps


class SubBlockRow(Row):
    """Fast-dLLM v2's decoding (arXiv 2509.26328).

    The canvas lies in blocks that see themselves and all to their left. A block begins with one
    pass over the block before, whose last position predicts its first token; that pass also leaves
    the final keys and values of that block. The other positions are decoded in smaller blocks
    (`DecodingParams.block_length`, `block_start` and `block_end` here), left to right.

    With cache `exact` a step computes the whole block. With `dual` it does so when a smaller block
    begins without any token; other steps compute the smaller block only and read the rest of the
    block, as it was, from the cache.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self._outer_length = spec.block_length
        self._stored = 0
        self._computed_block: int | None = None  # start of the last block that was computed whole
        super().__init__(request, sink, spec)

    def _canvas_length(self, spec: ModelSpec) -> int:
        return -(-self.answer_end // spec.block_length) * spec.block_length

    def _enter_block(self, start: int) -> None:
        length = self.params.block_length
        self.block_start = start // length * length
        self.block_end = self.block_start + length
        self.evidence = None
        self._block_passes = 0
        masks = int(self.masked[self.block_start : self.block_end].sum())
        self._block_masks = masks
        canvas_masks = len(self) - self.prompt_length
        self._block_steps = block_steps(self.params, canvas_masks, max(1, masks))
        self._block_step = 0
        self._skip_idle_steps()

    @property
    def _outer_start(self) -> int:
        return self.block_start // self._outer_length * self._outer_length

    @property
    def _first_token_is_due(self) -> bool:
        """Whether the next pass predicts a block's first token from the block before."""
        return self.block_start == self._outer_start and bool(self.masked[self.block_start])

    @property
    def step_params(self) -> DecodingParams:
        """A block's first token is the likeliest one, whatever the temperature."""
        return replace(self.params, temperature=0.0) if self._first_token_is_due else self.params

    @property
    def finish_reason(self) -> FinishReason | None:
        if self._end_token_id is not None:
            return "stop"
        return "length" if self.frontier == self.answer_end else None

    def open_positions(self) -> NDArray[np.int64]:
        if self._first_token_is_due:
            return np.array([self.block_start])
        return super().open_positions()

    def next_span(self) -> RowSpan:
        offset = self.cache_offsets[0] if self.cache_offsets else None
        if self._first_token_is_due:
            end = self.block_start
            start = self._first_uncached
            return RowSpan(start, end - start, end, end - 1, 1, offset)
        start = self._first_uncached
        end = keys = self._outer_start + self._outer_length
        if self._reuses_block:
            start = max(self._outer_start, self.block_start - self.params.vicinity)
            end = min(keys, self.block_end + self.params.vicinity)
        first = max(self.block_start - 1, self._outer_start, start)
        return RowSpan(start, end - start, keys, first, self.block_end - 1 - first, offset)

    def apply(self, decision: Decision) -> None:
        span, began_block = decision.span, self._first_token_is_due
        self._stored = max(self._stored, self._outer_start)
        if not began_block and span.start <= self._outer_start:
            self._computed_block = self._outer_start
        super().apply(decision)
        if began_block and self.finish_reason is None and not self._block_done:
            self._enter_block(self.block_start)  # its first token is not part of the schedule

    def _kind_of(self, span: RowSpan) -> PassKind:
        if self.refreshes_next:
            return "refresh"
        return "commit" if span.start < self._outer_start else "reuse"

    @property
    def _first_uncached(self) -> int:
        """The first position whose final keys and values no pass has left behind."""
        return max(self._stored, self.cached_tokens) if self.cache_offsets else 0

    @property
    def _reuses_block(self) -> bool:
        """Whether the next step reads what lies around its smaller block from the cache."""
        if self.params.cache != "dual" or self._computed_block != self._outer_start:
            return False
        interval = self.params.refresh_interval
        refreshes = interval is not None and self._block_passes % interval == 0
        return not refreshes and not bool(self.masked[self.block_start])

    @property
    def refreshes_next(self) -> bool:
        return not self.cache_offsets or self.is_fresh

    @property
    def shares_prefix(self) -> bool:
        return self.cache_runs == 1

    @property
    def final_tokens(self) -> int:
        """A block is final when the first token of the next one is written."""
        return self._stored

    @property
    def reusable_prompt(self) -> tuple[int, ...]:
        """The block that the first pass has to compute is not part of it."""
        blocks = (self.prompt_length - 1) // self._outer_length
        return self.request.prompt_ids[: blocks * self._outer_length]
