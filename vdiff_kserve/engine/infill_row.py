"""Rows whose answer fills holes in a given text, which the model sees on both sides of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff_kserve.engine.request import (
    EventSink,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
)
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.row_kinds import EditRow, RemaskRow
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.sampler import DecodingParams

JUDGED_TOKENS = 4
"""Tokens behind a hole that tell how well its text leads on to them."""


class InfillRow(Row):
    """Decoding of holes. A block is a run of positions with `block_length` masks, so holes that are
    near are filled together, and the whole canvas is always seen.

    An end token ends the text of its hole. What is right of it there becomes end tokens too and
    costs no pass.

    A request that is `judged` goes on when its holes are filled, with a pass for each of the first
    `JUDGED_TOKENS` given tokens behind the last hole: it tells how likely that token is where the
    filled text ends. How likely the hole's own tokens were says little about its length: in a hole
    that is too long, the model writes what follows it, and is sure of that.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self._end_fill = spec.eos_token_id
        self._hole = 0
        self._ended_holes = 0
        self._completion_tokens = 0
        self._mask_token_id = spec.mask_token_id or 0
        self._tokens: list[int] = []
        self._told: list[float] = []
        self._judging = False
        self._is_judged = False
        self._newly_committed = 0
        super().__init__(request, sink, spec)
        self._holes = runs((~self.fixed).nonzero().squeeze(-1))
        self.frontier = self._holes[0][0]

    @property
    def stats(self) -> GenerationStats:
        return self._stats_of(self._completion_tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` when end tokens ended all holes."""
        if self._hole < len(self._holes) or (self.request.judged and not self._is_judged):
            return None
        return "stop" if self._ended_holes == len(self._holes) else "length"

    @property
    def params(self) -> DecodingParams:
        """A judgement is told of whatever stands there; nothing else of the decoding matters."""
        if self._judging:
            return DecodingParams(policy="threshold", threshold=0.0, top_logprobs=0)
        return super().params

    def targets(self, positions: NDArray[np.int64]) -> Tensor | None:
        return self._text[torch.from_numpy(positions)] if self._judging else None

    def num_committed(self, decision: Decision) -> int:  # noqa: ARG002 - a judgement commits nothing
        return self._newly_committed

    def next_span(self) -> RowSpan:
        if self._judging:
            length = len(self)
            return RowSpan(0, length, length, self.block_start - self.shift, 1)
        span = super().next_span()
        if span.keys == len(self):
            return span
        # What is right of the block is not only masks, so `max_lookahead` cannot cut it off.
        queries = span.queries
        if self.params.cache != "dual" or self._refresh_is_due:
            queries = len(self) - span.start
        return RowSpan(
            span.start, queries, len(self), span.output_start, span.outputs, span.cache_offset
        )

    def open_positions(self) -> NDArray[np.int64]:
        if self._judging:
            return np.array([self.block_start])
        return super().open_positions()

    def apply(self, decision: Decision) -> None:
        """Take a step; when the holes are full, look at what follows them."""
        self._newly_committed = 0 if self._judging else len(decision.positions)
        if self._judging:
            self._note_judgement(decision)
            return
        super().apply(decision)
        if self.request.judged and self._hole == len(self._holes):
            self._begin_judgement()

    def _enter_block(self, start: int) -> None:
        masks = self.masked[start:].nonzero().squeeze(-1) + start
        if len(masks) == 0:  # all that is left is to be judged
            return
        own = masks[: self.params.block_length]
        self.block_start, self.block_end = int(own[0]), int(own[-1]) + 1
        self._begin_block()

    def _advance_frontier(self) -> None:
        """Send what became final of each hole, in their order."""
        events = []
        while self._hole < len(self._holes):
            hole, end = self._hole, self._holes[self._hole][1]
            first, tokens = self.frontier, self._pass_frontier(end)
            told = self._told_from(first)
            whole = self.frontier == end or self._end_token_id is not None
            self._tokens += tokens
            self._told += [each.logprob for each in told]
            if whole:
                self._leave_hole(end)
            ended = self._end_token_id is not None
            if tokens or ended or self.finish_reason is not None:
                events.append((tokens, told, hole, self._end_token_id))
            self._end_token_id = None
            if not whole:
                break
        for i, (tokens, told_of, hole, end_token) in enumerate(events, start=1):
            reason = self.finish_reason if i == len(events) else None
            self.sink(GenerationEvent(tokens, self.stats, reason, end_token, told_of, hole))

    def _pass_frontier(self, end: int) -> tuple[int, ...]:
        """Move the frontier to the first mask of a hole that ends at `end`, or past the first end
        token; the tokens that it passed, without the end token."""
        masks = self.masked[self.frontier : end].nonzero()
        reached = self.frontier + int(masks[0]) if len(masks) else end
        fresh = self.canvas[self.frontier : reached].tolist()
        ends = [i for i, token in enumerate(fresh) if token in self.request.end_token_ids]
        if ends:
            self._end_token_id = fresh[ends[0]]
            reached = self.frontier + ends[0] + 1
        self._completion_tokens += reached - self.frontier
        self.frontier = reached
        return tuple(fresh[: ends[0]] if ends else fresh)

    def _leave_hole(self, end: int) -> None:
        """Nothing in the hole is open any more."""
        rest = slice(self.frontier, end)
        self.canvas[rest] = self._end_fill
        self.masked[rest] = False
        self._ended_holes += self._end_token_id is not None
        self._hole += 1
        if self._hole < len(self._holes):
            self.frontier = self._holes[self._hole][0]

    def _begin_judgement(self) -> None:
        """Take the holes' unused rest, and what is far behind them, off the canvas."""
        end = self._holes[-1][1]
        behind = self.canvas[end : min(end + JUDGED_TOKENS, self.answer_end)]
        self._text = torch.cat(
            [self.canvas[: self._holes[-1][0]], torch.tensor(self._tokens).long(), behind]
        )
        self._judging = True
        self._judge(len(self._text) - len(behind))

    def _judge(self, position: int) -> None:
        """Mask a position and all behind it; when there is none, tell the judgement."""
        if position == len(self._text):
            self._tell_judgement()
            return
        self.block_start, self.block_end = position, position + 1
        self._lay_out(self._text.clone(), torch.arange(len(self._text)) >= position)
        self.canvas[position:] = self._mask_token_id

    def _note_judgement(self, decision: Decision) -> None:
        assert decision.logprobs is not None
        self.begun_pass = None
        self.finished_block_steps = None
        self._count_pass(decision.span)
        self._told.append(float(decision.logprobs.chosen[0]))
        self._judge(self.block_start + 1)

    def _tell_judgement(self) -> None:
        self._is_judged = True
        score = sum(self._told) / len(self._told)
        self.sink(GenerationEvent((), self.stats, self.finish_reason, score=score))


class InfillEditRow(EditRow, InfillRow):
    """The same with decoding that may replace what it wrote while a block is open."""

    def open_positions(self) -> NDArray[np.int64]:
        return InfillRow.open_positions(self) if self._judging else super().open_positions()


class InfillRemaskRow(RemaskRow, InfillRow):
    """The same with decoding that takes back what it wrote while a block is open."""

    def open_positions(self) -> NDArray[np.int64]:
        return InfillRow.open_positions(self) if self._judging else super().open_positions()

    def num_committed(self, decision: Decision) -> int:
        return InfillRow.num_committed(self, decision)


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """Where each run of consecutive numbers begins and ends.

    Args:
        positions: int64 [n], ascending, at least one.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    firsts = positions[begins].tolist()
    lasts = positions[begins.roll(-1)].tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
