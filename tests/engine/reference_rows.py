"""The published loops' own habits, for comparing with what they recorded.

The engine's rows spend no pass that commits nothing and leave no mask behind. The references
sometimes do; each class here is an engine row with one reference's habit.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from vdiff_kserve.engine import Engine
from vdiff_kserve.engine.request import EventSink, GenerationRequest
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.row_kinds import BlockCausalRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import ModelSpec, RowSpan


class EveryStepRow(Row):
    """LLaDA's `generate` and Dream's `diffusion_generate` run all their steps, also idle ones."""

    @property
    def _block_done(self) -> bool:
        return super()._block_done and self._block_step >= self._block_steps

    def _skip_idle_steps(self) -> None:
        pass


class FastDllmOrigRow(Row):
    """Fast-dLLM's first version makes at least one cached pass per block, needed or not."""

    @property
    def _block_done(self) -> bool:
        cached_pass_made = self.params.cache == "none" or self._block_step >= 2
        return super()._block_done and cached_pass_made


class FastDllmMainRow(Row):
    """Fast-dLLM's later version stops a dual-cache block after its steps, masks or not, and lets
    the next block's first pass fill what is left."""

    @property
    def _block_done(self) -> bool:
        capped = self.params.cache == "dual" and self._block_step >= self._block_steps
        return capped or super()._block_done

    def open_positions(self) -> NDArray[np.int64]:
        if self._block_step > 0:
            return super().open_positions()
        return self._masks[: self.block_end].nonzero()[0]

    def next_span(self) -> RowSpan:
        span = super().next_span()
        if self._block_step > 0:
            return span
        return RowSpan(0, len(self), len(self), 0, self.block_end, span.cache_offset)

    def _advance_frontier(self) -> None:
        """The canvas is done when its last block is, with or without masks."""
        if self._block_done and self.block_end == len(self):
            self.masked[:] = False
            super()._advance_frontier()


class FastDllmDreamRow(Row):
    """Fast-dLLM for Dream: a block's full pass writes its first token only; then at least one
    cached pass, whose window begins with the block."""

    def open_positions(self) -> NDArray[np.int64]:
        positions = super().open_positions()
        return positions[:1] if self._block_step == 0 else positions

    @property
    def quota(self) -> int:
        return 1 if self._block_step == 0 else super().quota

    def next_span(self) -> RowSpan:
        span = super().next_span()
        if self._block_step == 0:
            return span
        end = self.block_end if self.params.cache == "dual" else len(self)
        start, outputs = self.block_start, self.block_end - self.block_start
        return RowSpan(start, end - start, len(self), start, outputs, span.cache_offset)

    @property
    def _block_done(self) -> bool:
        steps_made = self._block_step >= (
            2 if self.params.policy == "threshold" else self._block_steps
        )
        return super()._block_done and steps_made

    def _skip_idle_steps(self) -> None:
        pass


class CarryOverRow(Row):
    """Fast-dLLM's `confidence_threshold` for Dream without a cache: a step takes its share of the
    schedule and what earlier steps left over, of that only what reaches the threshold."""

    share = 0

    @property
    def quota(self) -> int:
        left = int(self.masked.sum())
        steps_left = self._block_steps - self._block_step
        due = self._block_masks // self._block_steps * (self._block_step + 1)
        written = self._block_masks - left
        return due - written if steps_left > 0 else left


class InfillRow(EveryStepRow):
    """Dream's loop also fills mask tokens that stand inside the prompt."""

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        super().__init__(request, sink, spec)
        self._lay_out(self.canvas, self.canvas == spec.mask_token_id)
        self.frontier = int(self.masked.nonzero()[0])
        self._enter_block(self.frontier)
        self.block_end = len(self)
        self._block_masks = int(self.masked.sum())
        self._block_steps = self.params.steps or self._block_masks


class FastDllmV2Row(SubBlockRow):
    """Fast-dLLM v2's `generate` runs over the prompt's whole blocks before anything else."""

    @property
    def _prompt_is_due(self) -> bool:
        return self.is_fresh and self._outer_start > 0 and not self._first_token_is_due

    def open_positions(self) -> NDArray[np.int64]:
        return np.array([], dtype=np.int64) if self._prompt_is_due else super().open_positions()

    def next_span(self) -> RowSpan:
        if not self._prompt_is_due:
            return super().next_span()
        end = self._outer_start
        return RowSpan(0, end, end, end - 1, 1, self.cache_offsets[0])

    def apply(self, decision: Decision) -> None:
        was_prompt = self._prompt_is_due
        super().apply(decision)
        if was_prompt:
            self._computed_block = None
            self._enter_block(self.block_start)


class WholeCanvasRow(BlockCausalRow):
    """LLaDA2's `generate` also fills what its last block has beyond the answer."""

    @property
    def _block_done(self) -> bool:
        return not self.masked[self.block_start : self.block_end].any()


class WholeBlocksRow(WholeCanvasRow):
    """Without `eos_early_stop` it looks for end tokens in full blocks only."""

    def _advance_frontier(self) -> None:
        if self._block_done:
            super()._advance_frontier()


class SdarRow(WholeBlocksRow):
    """SDAR's `block_diffusion_generate` runs over the prompt's whole blocks before anything else,
    and once more over every block that is full, for its keys and values."""

    def _enter_block(self, start: int) -> None:
        self._stored = False
        super()._enter_block(start)

    @property
    def _prompt_is_due(self) -> bool:
        return self.is_fresh and self.block_start > 0

    def open_positions(self) -> NDArray[np.int64]:
        return super().open_positions()[: 0 if self._prompt_is_due else None]

    def next_span(self) -> RowSpan:
        start, end = self.block_start, self.block_end
        if self._prompt_is_due:
            start, end = 0, start
        return RowSpan(start, end - start, end, start, end - start, self.cache_offsets[0])

    def apply(self, decision: Decision) -> None:
        if self._prompt_is_due:
            self._count_pass(decision.span)
            return
        self._stored = super()._block_done
        super().apply(decision)

    @property
    def _block_done(self) -> bool:
        return self._stored


def engine_of(row_class: type[Row]) -> type[Engine]:
    """An engine whose rows are of `row_class` and record their passes; it keeps them in `rows`."""

    class RecordingRow(row_class):
        def apply(self, decision: Decision) -> None:
            self.commits = [
                *getattr(self, "commits", []),
                (self.block_start, len(decision.positions)),
            ]
            super().apply(decision)

    class ReferenceEngine(Engine):
        def make_row(self, request: GenerationRequest, sink: EventSink) -> Row:
            row = RecordingRow(request, sink, self.spec)
            self.rows = [*getattr(self, "rows", []), row]
            return row

    return ReferenceEngine


def lockstep_passes(rows: list[Row]) -> int:
    """Passes of a batch whose rows wait for each other at the end of every block."""
    passes = [Counter(start - row.prompt_length for start, _ in row.commits) for row in rows]
    return sum(max(counts[block] for counts in passes) for block in passes[0])
