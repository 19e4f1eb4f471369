"""Rows whose answer follows a grammar, for every way of decoding.

The policies choose as ever; what they choose is tentative until the frontier passes over it. So the
canvas right of the frontier holds what the model is sure of, and left of it what the grammar has
accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff_kserve.engine.autoregressive import AutoregressiveRow
from vdiff_kserve.engine.grammar import GrammarCursor, GrammarError
from vdiff_kserve.engine.request import (
    EventSink,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
)
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.row_kinds import ApdRow, BlockCausalRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import ModelSpec, RowSpan


class GrammarRow(Row):
    """Block by block decoding of an answer that follows a grammar.

    After each step the grammar takes over: what is written from the frontier on becomes final as
    far as it matches and can still be ended in the room that is left; the rest of the block is
    masked again where it does not match; and what the grammar leaves no choice about is written at
    once. A block that this fills costs no pass.
    """

    def __init__(
        self, request: GenerationRequest, sink: EventSink, spec: ModelSpec, cursor: GrammarCursor
    ) -> None:
        super().__init__(request, sink, spec)
        self._cursor = cursor
        self._mask_token_id = spec.mask_token_id or 0
        self._settled = self.prompt_length
        self._write_forced()
        self._begin()

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` when the grammar's text is complete: there is no other end."""
        if self._end_token_id is not None:
            return "stop"
        is_told = self.frontier == self._settled
        return "stop" if is_told and self._cursor.complete else None

    def admitted(self) -> None:
        super().admitted()
        self._tell()

    def next_allowed(self, vocab_size: int) -> tuple[int, Tensor]:
        """The frontier, and which tokens may stand there: bool [vocab]."""
        return self._settled, self._cursor.allowed(vocab_size)

    def review(self, positions: Tensor, accept: Tensor, tokens: Tensor) -> Tensor:
        """Of the accepted positions those up to which the canvas, completed by the candidates of
        this step, begins a text of the grammar; at least the frontier.

        This is the look-ahead of LAVE (arXiv 2602.00612) with the likeliest completion.
        """
        inside = positions < self.answer_end
        accept = accept & inside
        if accept.any():
            end = int(positions[accept].max()) + 1
            line = self.canvas[:end].clone()
            filled = positions < end
            line[positions[filled]] = tokens[filled]
            reached = self._settled + self._cursor.extends(line[self._settled :].tolist())
            accept = accept & (positions < reached)
        return accept if accept.any() else positions == self._settled

    def _begin(self) -> None:
        """Enter the first block that has a mask."""
        self._enter_block(self.prompt_length)

    def _enter_block(self, start: int) -> None:
        super()._enter_block(start)
        while self._block_done and self.block_end < len(self):
            super()._enter_block(self.block_end)

    def _advance_frontier(self) -> None:
        self._settle()
        self._tell()

    def _tell(self) -> None:
        """Send what became final; that the text has ended too, where nothing is new but that."""
        before = self.frontier
        super()._advance_frontier()
        if self.frontier == before and self.finish_reason is not None:
            self.sink(GenerationEvent((), self.stats, self.finish_reason))

    def _settle(self) -> None:
        """Let the grammar take what is written from the frontier on."""
        asked = self._settled
        while not self._cursor.complete:
            masks = self.masked[self._settled : self.answer_end].nonzero()
            length = int(masks[0]) if len(masks) else self.answer_end - self._settled
            written = self.canvas[self._settled : self._settled + length].tolist()
            taken = self._cursor.take(written)
            self._settled += taken
            if taken < length:
                self._mask_from(self._settled, self.block_end)
                if self._settled == asked:
                    # The model chose among all that may come next, but nothing it chose can end.
                    self._write(self._cursor.take_ending())
            if not self._write_forced() and (taken < length or length == 0):
                break
        if self._cursor.complete:
            self._mask_from(self._settled, len(self))

    def _write_forced(self) -> bool:
        """Write what the grammar leaves no choice about; says whether that was anything."""
        forced = self._cursor.take_forced()
        self._write(forced)
        return bool(forced)

    def _write(self, tokens: Sequence[int]) -> None:
        """Write tokens that the grammar has passed already."""
        end = self._settled + len(tokens)
        self.canvas[self._settled : end] = torch.tensor(tokens, dtype=self.canvas.dtype)
        self.masked[self._settled : end] = False
        for position in range(self._settled, end):
            self._logprobs.forget(position)  # of what stood there before
        self._settled = end

    def _mask_from(self, start: int, end: int) -> None:
        self.canvas[start:end] = self._mask_token_id
        self.masked[start:end] = True


class BlockCausalGrammarRow(GrammarRow, BlockCausalRow):
    """The same for a model whose blocks see themselves and all to their left. Blocks that were
    filled without a pass get their final keys and values in the next one."""

    _stored = 0
    """Canvas positions from the left whose final keys and values are in the cache."""

    @property
    def _first_block(self) -> bool:
        return self.is_fresh

    @property
    def final_tokens(self) -> int:
        return self._stored

    def next_span(self) -> RowSpan:
        span = super().next_span()
        if not self.cache_offsets or self._block_passes > 0:
            return span
        start = max(self._stored, self.cached_tokens)
        return RowSpan(
            start, span.keys - start, span.keys, span.output_start, span.outputs, span.cache_offset
        )

    def apply(self, decision: Decision) -> None:
        self._stored = self.block_start
        super().apply(decision)


class SubBlockGrammarRow(GrammarRow, SubBlockRow):
    """The same for a model whose blocks are decoded in smaller ones."""


class AutoregressiveGrammarRow(GrammarRow, AutoregressiveRow):
    """One token after the other, but for those that the grammar leaves no choice about."""


class ApdGrammarRow(GrammarRow, ApdRow):
    """Adaptive parallel decoding with the grammar as one more verifier of the draft."""

    def _begin(self) -> None:
        self._enter_block(self._settled)

    def _enter_block(self, start: int) -> None:
        ApdRow._enter_block(self, start)
        self._recomputed = 0

    def auxiliary_span(self) -> RowSpan:
        span = super().auxiliary_span()
        end = span.start + span.queries
        return RowSpan(
            self._recomputed,
            end - self._recomputed,
            end,
            span.output_start,
            span.outputs,
            span.cache_offset,
        )

    def apply(self, decision: Decision) -> None:
        before = self.frontier
        super().apply(decision)
        self._accepted = self.frontier - before
        # The auxiliary model has seen the draft; what the grammar wrote behind it, it has not.
        places = decision.positions
        same = (self._ids[places] == decision.tokens) & ~self._masks[places]
        self._recomputed = before + int(same.cumprod().sum()) - 1


def make_grammar_row(
    request: GenerationRequest,
    sink: EventSink,
    spec: ModelSpec,
    cursor: GrammarCursor,
    has_auxiliary: bool,
) -> Row:
    """The row of a request with a grammar. What the grammar has passed is final, so that decoding
    which edits has nothing to edit."""
    if spec.renoising is not None:
        raise GrammarError("this model writes whole canvases, which cannot follow a grammar")
    if request.decoding.policy == "p2":
        raise GrammarError(
            "policy p2 takes back what it wrote, which cannot follow a grammar; name another policy"
        )
    if request.decoding.policy == "apd" and has_auxiliary:
        return ApdGrammarRow(request, sink, spec, cursor)
    if spec.autoregressive:
        return AutoregressiveGrammarRow(request, sink, spec, cursor)
    if spec.sub_blocks:
        return SubBlockGrammarRow(request, sink, spec, cursor)
    row_class = BlockCausalGrammarRow if spec.block_causal else GrammarRow
    return row_class(request, sink, spec, cursor)
