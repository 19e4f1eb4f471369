"""One running request: its canvas, its place in it, and what it has cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

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
    StepView,
    TokenLogprob,
)
from vdiff_kserve.engine.told_logprobs import ToldLogprobs
from vdiff_kserve.models import ForwardPass, ModelSpec, RowSpan
from vdiff_kserve.sampler import (
    DREAM_POLICIES,
    DecodingParams,
    Evidence,
    Logprobs,
    TokenRules,
    block_steps,
    quota,
    seed_of_draw,
)

PassKind = Literal["refresh", "reuse", "commit"]


@dataclass(frozen=True)
class Decision:
    """What one step decided for one row.

    Attributes:
        span: what the forward pass ran over.
        positions: int64 [n], canvas positions to write.
        tokens: int64 [n], what to write there.
        evidence: of the active block, for the `credit` policy.
        auxiliary: forward passes of the auxiliary model.
        logprobs: of the written positions, when the row asks for them.
    """

    span: RowSpan
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    evidence: Evidence | None = None
    auxiliary: int = 0
    logprobs: Logprobs | None = None


class Row:
    """The state of one request while it is in the batch, decoded block by block.

    The canvas is the prompt followed by `max_tokens` masked positions, but for tokens that are
    given. Which positions are masked is kept apart from the ids, since a prompt may hold the mask
    token's id.

    Attributes:
        fixed: bool [tokens], what the request itself brought: the prompt and given tokens.
        place: order among waiting rows: priority, then arrival. Set by the scheduler.
        last_round: number of the last round that the row took part in. Set by the scheduler.
        begun_pass: the layers that ran so far of a pass that is spread over rounds.
        cached_tokens: how much of the prompt was in the cache when the row was admitted.
        pass_kind: what the latest pass was.
        finished_block_steps: denoising steps of the block that the latest step finished, if any.
        token_rules: what the request's constraints come to over the vocabulary, once it is known.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self.request = request
        self.sink = sink
        self.prompt_length = len(request.prompt_ids)
        self.answer_end = self.prompt_length + request.max_tokens
        canvas = torch.full((self._canvas_length(spec),), spec.mask_token_id or 0)
        canvas[: self.prompt_length] = torch.tensor(request.prompt_ids)
        self._lay_out(canvas, torch.arange(len(canvas)) >= self.prompt_length)
        if request.given:
            given = torch.tensor(request.given)
            places = (given >= 0).nonzero().squeeze(-1)
            self.canvas[places + self.prompt_length] = given[places]
            self.masked[places + self.prompt_length] = False
        self.fixed = ~self.masked
        self.frontier = self.prompt_length
        self.aborted = False
        self.place = (request.priority, 0)
        self.last_round = 0
        self.begun_pass: ForwardPass | None = None
        self.cached_tokens = 0
        self.pass_kind: PassKind = "refresh"
        self.finished_block_steps: int | None = None
        self.token_rules: TokenRules | None = None
        self._logprobs = ToldLogprobs()
        self._created = time.monotonic()
        self._queue_seconds = 0.0
        self.cache_offsets: tuple[int, ...] = ()
        self.auxiliary_offset: int | None = None
        self.shift = int(spec.shifted_logits)
        self.evidence: Evidence | None = None
        self._refreshes = 0
        self._reuses = 0
        self._commits = 0
        self._auxiliary = 0
        self._steps = 0
        self._end_token_id: int | None = None
        self._answer_masks = int(self.masked.sum())
        self._enter_block(self.prompt_length)

    def _lay_out(self, canvas: Tensor, masked: Tensor) -> None:
        """Decode this canvas from here on. What every step does to it goes through NumPy, over the
        same memory: its operations on a few numbers take a fifth of the time of torch's."""
        self.canvas, self.masked = canvas, masked
        self._ids, self._masks = canvas.numpy(), masked.numpy()

    @property
    def number(self) -> int:
        """Which of the engine's requests this is, counted as they arrive."""
        return self.place[1]

    @property
    def params(self) -> DecodingParams:
        return self.request.decoding

    @property
    def step_params(self) -> DecodingParams:
        """How the next step is sampled."""
        return self.params

    @property
    def step_seed(self) -> int:
        """Of the next step's random numbers. Every step draws its candidates anew, as the published
        loops do: a position whose draw was not sure enough to be written gets another one."""
        return seed_of_draw(self.params.seed, self.num_passes)

    def __len__(self) -> int:
        """Tokens of the canvas."""
        return len(self._ids)

    @property
    def cache_runs(self) -> int:
        """How many runs of cache the row needs: a guided row has a second one, without prompt."""
        if self.params.cache == "none":
            return 0
        return 2 if self.params.cfg_scale > 0 else 1

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the auxiliary model checks the row's tokens."""
        return False

    @property
    def quota(self) -> int:
        """Tokens that the next step commits by schedule, or at most for APD by confidence."""
        if self.params.policy == "apd":
            return self.params.apd_max_parallel
        left = self._block_masks
        if self.params.policy in DREAM_POLICIES:
            left = self._masks_of_block
        return quota(self.params, self._block_masks, left, self._block_steps, self._block_step)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the row is done; None while it is not."""
        if self._end_token_id is not None:
            return "stop"
        return "length" if self.frontier == self.answer_end and self._block_done else None

    @property
    def stats(self) -> GenerationStats:
        return self._stats_of(self.frontier - self.prompt_length)

    def _stats_of(self, completion_tokens: int) -> GenerationStats:
        return GenerationStats(
            refreshes=self._refreshes,
            reuses=self._reuses,
            commits=self._commits,
            auxiliary=self._auxiliary,
            steps=self._steps,
            completion_tokens=completion_tokens,
            queue_seconds=self._queue_seconds,
            cached_tokens=self.cached_tokens,
        )

    @property
    def shares_prefix(self) -> bool:
        """Whether the row's cache can begin with, and be left to, another request's."""
        return False

    @property
    def final_tokens(self) -> int:
        """Canvas positions from the left whose cached keys and values will not change."""
        return 0

    @property
    def reusable_prompt(self) -> tuple[int, ...]:
        """The part of the prompt that may come from another request's cache."""
        return ()

    @property
    def pass_tokens(self) -> int:
        """Tokens that the next pass computes; a guided row computes its own twice."""
        return self.next_span().queries * (2 if self.params.cfg_scale > 0 else 1)

    @property
    def refreshes_next(self) -> bool:
        """Whether the next pass runs over the canvas from its beginning."""
        return self.next_span().start == 0

    @property
    def num_passes(self) -> int:
        """Forward passes so far."""
        return self._refreshes + self._reuses + self._commits

    @property
    def is_fresh(self) -> bool:
        """Whether no pass has run yet."""
        return self.num_passes == 0

    @property
    def first_canvas(self) -> tuple[object, ...]:
        """What decides, with the canvas' length, what the first pass runs over."""
        request = self.request
        return request.prompt_ids, request.grammar, request.given, request.draft, request.scoring

    def targets(
        self,
        positions: NDArray[np.int64],  # noqa: ARG002 - a row that scores looks at them
    ) -> Tensor | None:
        """The tokens whose log probabilities are told in place of the candidates', int64 [n], for
        a row that scores; None for all others."""
        return None

    def num_committed(self, decision: Decision) -> int:
        """Tokens of the answer that a decision writes."""
        return len(decision.positions)

    def layers_left(self, num_layers: int) -> int:
        """How many of the model's layers the next pass still has to run."""
        return num_layers if self.begun_pass is None else self.begun_pass.layers_left

    def drop_pass(self) -> None:
        """Forget the layers that ran of the next pass."""
        self.begun_pass = None

    def admitted(self) -> None:
        """The row has its place in the batch."""
        self._queue_seconds = time.monotonic() - self._created

    def next_span(self) -> RowSpan:
        """The part of the canvas that the next step runs over."""
        params, visible = self.params, len(self)
        if params.max_lookahead is not None:
            visible = min(visible, self.block_end + params.max_lookahead)
        output_start = self.block_start - self.shift
        outputs = self.block_end - self.block_start
        start, end = 0, visible
        if not self._refresh_is_due:
            start = max(0, min(self.block_start - params.vicinity, output_start))
            if params.cache == "dual":
                end = min(visible, self.block_end + params.vicinity)
        offset = self.cache_offsets[0] if self.cache_offsets else None
        return RowSpan(start, end - start, visible, output_start, outputs, offset)

    @property
    def written_answer(self) -> Tensor:
        """The answer's committed tokens, -1 for a mask: int64 [max_tokens]."""
        answer = slice(self.prompt_length, self.answer_end)
        return torch.where(self.masked[answer], -1, self.canvas[answer])

    def open_positions(self) -> NDArray[np.int64]:
        """Positions that the next step may write: int64 [n], absolute, ascending. They are masks,
        but for rows that may change what they wrote."""
        start, end = self.block_start, self.block_end
        return self._masks[start:end].nonzero()[0] + start

    def apply(self, decision: Decision) -> None:
        """Take one step: write its tokens, send what became final, move to the next block."""
        self._ids[decision.positions] = decision.tokens
        self._masks[decision.positions] = False
        if decision.logprobs is not None:
            self._note_logprobs(decision, decision.logprobs)
        self.begun_pass = None
        self._count_pass(decision.span)
        self._auxiliary += decision.auxiliary
        self._steps += len(decision.positions) > 0
        self._block_step += 1
        self._block_passes += 1
        self.evidence = decision.evidence
        if self.request.watched:
            view = self._view(decision.positions)
            self.sink(GenerationEvent((), self.stats, view=view))
        self._advance_frontier()
        block_done = self._block_done
        self.finished_block_steps = self._block_passes if block_done else None
        if self.finish_reason is not None:
            return
        if block_done:
            self._enter_block(self.block_end)
        else:
            self._skip_idle_steps()

    def _canvas_length(self, spec: ModelSpec) -> int:  # noqa: ARG002 - other kinds need it
        return self.answer_end

    def _count_pass(self, span: RowSpan) -> None:
        self.pass_kind = self._kind_of(span)
        self._refreshes += self.pass_kind == "refresh"
        self._reuses += self.pass_kind == "reuse"
        self._commits += self.pass_kind == "commit"

    def _kind_of(self, span: RowSpan) -> PassKind:
        return "refresh" if span.queries == span.keys else "reuse"

    @property
    def _refresh_is_due(self) -> bool:
        if self.params.cache == "none":
            return True
        interval = self.params.refresh_interval
        return self._block_passes % interval == 0 if interval else self._block_passes == 0

    @property
    def _masks_of_block(self) -> int:
        return int(np.count_nonzero(self._masks[self.block_start : self.block_end]))

    @property
    def _block_done(self) -> bool:
        return self._masks_of_block == 0

    def _enter_block(self, start: int) -> None:
        """Begin the first block from `start` on that has a mask."""
        end = start + self.params.block_length
        while end < len(self) and not self._masks[start:end].any():
            start, end = end, end + self.params.block_length
        self.block_start, self.block_end = start, min(end, len(self))
        self._begin_block()

    def _begin_block(self) -> None:
        self.evidence = None
        self._block_masks = self._masks_of_block
        self._block_steps = block_steps(self.params, self._answer_masks, self._block_masks)
        self._block_step = 0
        self._block_passes = 0
        self._skip_idle_steps()

    def _skip_idle_steps(self) -> None:
        """Pass over steps that would commit nothing; they would cost a forward pass."""
        while self.quota == 0 and self._block_step < self._block_steps:
            self._block_step += 1

    def _view(self, written: NDArray[np.int64]) -> StepView:
        """What a watcher is told of a step."""
        inside = written[written < self.answer_end]
        answer = self.masked[self.prompt_length : self.answer_end]
        return StepView(
            step=self.num_passes,
            positions=tuple((inside - self.prompt_length).tolist()),
            token_ids=tuple(self._ids[inside].tolist()),
            confidence=tuple(self._logprobs.probability(p) for p in inside.tolist()),
            masks=int(answer.sum()),
        )

    def _note_logprobs(self, decision: Decision, told: Logprobs) -> None:
        count = self.params.top_logprobs or 0
        self._logprobs.note(decision.positions, decision.tokens, told, count)

    def _told_from(self, first: int) -> tuple[TokenLogprob, ...]:
        """What is told of the tokens from `first` to the frontier; nothing, unless it was asked."""
        if self.request.decoding.top_logprobs is None:
            return ()
        return tuple(
            self._logprobs.take(p) or self._undoubted(int(self.canvas[p]))
            for p in range(first, self.frontier)
        )

    def _undoubted(self, token: int) -> TokenLogprob:
        """What is told of a token that the model had no choice about."""
        top = ((token, 0.0),) if self.request.decoding.top_logprobs else ()
        return TokenLogprob(token, 0.0, 1, top)

    def _advance_frontier(self) -> None:
        """Move the frontier to the first mask, or past the first end token; send what it passed."""
        if self.frontier < len(self) and self._masks[self.frontier]:
            return
        masks = self._masks[self.frontier :].nonzero()[0]
        reached = self.frontier + int(masks[0]) if len(masks) else len(self)
        reached = min(reached, self.answer_end)
        first = self.frontier
        fresh = self._ids[self.frontier : reached].tolist()
        ends = [i for i, token in enumerate(fresh) if token in self.request.end_token_ids]
        if ends:
            self._end_token_id = fresh[ends[0]]
            self.frontier += ends[0] + 1
            fresh = fresh[: ends[0]]
        else:
            self.frontier = reached
        if fresh or self.finish_reason is not None:
            told = self._told_from(first)
            event = GenerationEvent(
                tuple(fresh), self.stats, self.finish_reason, self._end_token_id, told
            )
            self.sink(event)
