"""The kinds of rows: decoding that edits or takes back, block-causal models, and adaptive parallel
decoding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from vdiff_kserve.engine.request import EventSink, GenerationRequest, StepView
from vdiff_kserve.engine.row import Decision, PassKind, Row
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.sampler import block_steps


class RevisingRow(Row):
    """Decoding that may change what it wrote while its block is open: nothing of a block is final,
    and so nothing is sent, before that."""

    def open_positions(self) -> NDArray[np.int64]:
        start, end = self.block_start, self.block_end
        return (~self.fixed[start:end]).numpy().nonzero()[0] + start

    def written_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens that stand at `positions`, -1 for a mask: int64 [n]."""
        return np.where(self._masks[positions], -1, self._ids[positions])


class EditRow(RevisingRow):
    """Decoding that may replace a written token while its block is open (LLaDA2.1).

    A block is closed when it has no mask and a step changes nothing, or after `max_post_edits` such
    steps.
    """

    def _enter_block(self, start: int) -> None:
        self._post_edits = 0
        self._closed = False
        super()._enter_block(start)

    def apply(self, decision: Decision) -> None:
        masks = int(self.masked[self.block_start : self.block_end].sum())
        filled = int(self._masks[decision.positions].sum())
        self._post_edits += masks == 0
        settled = masks == 0 and len(decision.positions) == 0
        spent = masks == filled and self._post_edits >= self.params.max_post_edits
        self._closed = settled or spent
        super().apply(decision)

    @property
    def _block_done(self) -> bool:
        return self._closed

    def _advance_frontier(self) -> None:
        if self._closed:
            super()._advance_frontier()


class RemaskRow(RevisingRow):
    """Decoding whose every step chooses anew what stays written in the open block (policy `p2`).

    Of a decision's positions the masked ones are written and the written ones become masks again.
    Every step draws its candidates anew, so that what was taken back can become something else. A
    block is closed when it has no mask.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self._mask = spec.mask_token_id or 0
        self._taken_back = np.empty(0, dtype=np.int64)
        super().__init__(request, sink, spec)

    def apply(self, decision: Decision) -> None:
        fills = self._masks[decision.positions]
        self._taken_back = decision.positions[~fills]
        self._masks[self._taken_back] = True
        self._ids[self._taken_back] = self._mask
        for position in self._taken_back.tolist():
            self._logprobs.forget(position)
        told = decision.logprobs
        super().apply(
            replace(
                decision,
                positions=decision.positions[fills],
                tokens=decision.tokens[fills],
                logprobs=None if told is None else told.part(torch.from_numpy(fills)),
            )
        )

    def num_committed(self, decision: Decision) -> int:
        return len(decision.positions) - len(self._taken_back)

    def _advance_frontier(self) -> None:
        if self._block_done:
            super()._advance_frontier()

    def _view(self, written: NDArray[np.int64]) -> StepView:
        again = self._taken_back[self._taken_back < self.answer_end] - self.prompt_length
        return replace(super()._view(written), masked_again=tuple(again.tolist()))


class BlockCausalRow(Row):
    """Decoding of a model whose blocks see themselves and all to their left (SDAR).

    Blocks are aligned to the canvas, so the first one may begin with the prompt's tail, and the
    canvas is filled up to a whole block. With the `exact` cache a pass runs over the active block
    only; the final keys and values of the block before it are computed in the same pass as its
    first step. Steps share a whole block out, as in the published loops: a first block that begins
    with the prompt's tail takes fewer of them.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self._block_length = spec.block_length
        super().__init__(request, sink, spec)

    def _canvas_length(self, spec: ModelSpec) -> int:
        return -(-self.answer_end // spec.block_length) * spec.block_length

    def _enter_block(self, start: int) -> None:
        self.block_start = start // self._block_length * self._block_length
        self.block_end = self.block_start + self._block_length
        self.evidence = None
        self._block_masks = self._block_length
        canvas_masks = len(self) - self.prompt_length
        self._block_steps = block_steps(self.params, canvas_masks, self._block_length)
        self._block_step = 0
        self._block_passes = 0
        self._skip_idle_steps()

    @property
    def _block_done(self) -> bool:
        """Masks that fill the last block up beyond the answer may stay."""
        return not self.masked[self.block_start : min(self.block_end, self.answer_end)].any()

    def next_span(self) -> RowSpan:
        end, length = self.block_end, self._block_length
        start = self.block_start
        if not self.cache_offsets or self._first_block:
            start = self.cached_tokens
        elif self._block_passes == 0:
            start -= length
        offset = self.cache_offsets[0] if self.cache_offsets else None
        first = self.block_start - self.shift
        return RowSpan(start, end - start, end, first, length, offset)

    @property
    def _first_block(self) -> bool:
        """Whether nothing is cached yet."""
        return self.block_start <= self.prompt_length and self._block_passes == 0

    @property
    def refreshes_next(self) -> bool:
        return not self.cache_offsets or self._first_block

    @property
    def shares_prefix(self) -> bool:
        return self.cache_runs == 1

    @property
    def final_tokens(self) -> int:
        behind = 0 if self._block_passes > 0 else self._block_length
        return max(0, self.block_start - behind)

    @property
    def reusable_prompt(self) -> tuple[int, ...]:
        return self.request.prompt_ids[: self.block_start]

    def _kind_of(self, span: RowSpan) -> PassKind:
        if self.refreshes_next:
            return "refresh"
        return "commit" if span.start < self.block_start else "reuse"


class BlockCausalEditRow(EditRow, BlockCausalRow):
    """LLaDA2.1's decoding: blocks that see all to their left, edited before they are closed."""


class ApdRow(Row):
    """Left-to-right decoding of a draft that the auxiliary model checks (arXiv 2506.00413).

    There are no blocks: the window of positions that the model may write begins at the frontier and
    moves with it, and nothing right of the window is seen.
    """

    def _enter_block(self, start: int) -> None:
        self._block_step = 0
        self._block_passes = 0
        self._accepted = 0
        self._set_window(start)

    def _set_window(self, start: int) -> None:
        self.block_start = start
        lookahead = self.params.apd_lookahead
        self.block_end = len(self) if lookahead is None else min(start + lookahead, len(self))

    @property
    def cache_runs(self) -> int:
        if self.params.apd_window is None:
            return 0
        return 2 if self.params.cfg_scale > 0 else 1

    @property
    def uses_auxiliary(self) -> bool:
        return True

    @property
    def step_seed(self) -> int:
        """The same for all steps: a position whose draft was rejected is drawn with the noise that
        the target was, so that rejecting favours no token."""
        return self.params.seed

    @property
    def quota(self) -> int:
        return self.params.apd_max_parallel

    @property
    def draft_length(self) -> int:
        """Tokens that the next step proposes."""
        return min(self.block_end - self.block_start, self.quota)

    def next_span(self) -> RowSpan:
        left = 0
        if self.cache_offsets and self._block_passes > 0:
            window = self.params.apd_window or 0
            left = max(self.frontier - window - self._accepted + 1, 0)
            left = min(left, self.frontier - self.shift)
        offset = self.cache_offsets[0] if self.cache_offsets else None
        right, first = self.block_end, self.frontier - self.shift
        return RowSpan(left, right - left, right, first, self.draft_length, offset)

    def auxiliary_span(self) -> RowSpan:
        """The auxiliary model's pass over the draft: the last outputs predict its tokens."""
        start = 0 if self._block_passes == 0 else self.frontier - 1
        end = self.frontier + self.draft_length - 1
        offset = self.auxiliary_offset
        return RowSpan(start, end - start, end, self.frontier - 1, self.draft_length, offset)

    def open_positions(self) -> NDArray[np.int64]:
        return np.arange(self.frontier, self.frontier + self.draft_length)

    def apply(self, decision: Decision) -> None:
        self._accepted = len(decision.positions)
        super().apply(decision)
        self.finished_block_steps = None  # there are no blocks
        self._set_window(self.frontier)

    @property
    def _block_done(self) -> bool:
        return self.frontier == len(self)

    def _skip_idle_steps(self) -> None:
        """Every step commits."""
