"""Rows that score a text instead of writing one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff_kserve.engine.request import (
    EventSink,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Scoring,
    TokenLogprob,
)
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.sampler import DecodingParams, noise


@dataclass(frozen=True)
class Probe:
    """One forward pass that scores.

    Attributes:
        masked: int64 [n], canvas positions that hold a mask.
        scored: int64 [m], canvas positions whose tokens are scored, ascending.
        weight: what their log probabilities count.
    """

    masked: Tensor
    scored: Tensor
    weight: float = 1.0


def probe_of(scoring: Scoring, number: int, length: int) -> Probe:
    """Probe `number` of a text of `length` tokens."""
    behind = torch.arange(scoring.context, length)
    if scoring.method == "causal":
        return Probe(behind[:0], behind)
    if scoring.method == "monte_carlo":
        return _sample(scoring, number, behind)
    here = behind[number : number + 1]
    return Probe(behind[number:] if scoring.method == "chain" else here, here)


def _sample(scoring: Scoring, number: int, positions: Tensor) -> Probe:
    """Mask as many random positions as is drawn for this sample.

    The numbers of masks are spread evenly over the samples, from a random one on, so that their
    mean has less variance than that of independent draws; each is uniform by itself.
    """
    total = len(positions)
    seed = torch.tensor([scoring.seed])
    first = int(noise.uniform(seed, torch.zeros(1, dtype=torch.int64), "order").item() * total)
    masks = 1 + (first + number * total // scoring.samples) % total
    seeds = torch.full_like(positions, scoring.seed + number + 1)
    order = noise.uniform(seeds, positions, "order").squeeze(-1).argsort()
    chosen = positions[order[:masks].sort().values]
    return Probe(chosen, chosen, total / masks / scoring.samples)


class ScoringRow(Row):
    """Scores the tokens of its prompt, a probe per step. Its only event holds one `TokenLogprob`
    per scored position, ascending.

    With `monte_carlo`, a position's score is the weighted sum over the samples that masked it; its
    rank is the worst one it had, and `top` has the sum of the likeliest tokens' log probabilities,
    so that it equals the score if the token always was the likeliest. Where no sample masked it,
    score and rank are 0.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        assert request.scoring is not None
        self._scoring = request.scoring
        self._mask_token_id = spec.mask_token_id or 0
        self._is_masked_by_blocks = spec.block_causal
        self._probe_number = self._scoring.probes[0]
        self._scores: dict[int, TokenLogprob] = {}
        super().__init__(request, sink, spec)

    def _canvas_length(self, spec: ModelSpec) -> int:
        block = spec.decoder.attention_block or 1
        return -(-self.answer_end // block) * block

    def _enter_block(self, start: int) -> None:  # noqa: ARG002 - a probe has no blocks
        """Put the next probe on the canvas."""
        length = self.prompt_length
        self._probe = probe_of(self._scoring, self._probe_number, length)
        self.canvas[:length] = torch.tensor(self.request.prompt_ids)
        self.canvas[self._probe.masked] = self._mask_token_id
        self.masked[:length] = False
        self.masked[self._probe.scored] = True
        self.block_start = int(self._probe.scored[0])
        self.block_end = int(self._probe.scored[-1]) + 1

    @property
    def params(self) -> DecodingParams:
        """Every scored position is told of; nothing else of the decoding matters."""
        told = self.request.decoding.top_logprobs or 0
        return DecodingParams(policy="threshold", threshold=0.0, top_logprobs=told)

    @property
    def quota(self) -> int:
        return 0

    @property
    def finish_reason(self) -> FinishReason | None:
        return "length" if self._probe_number == self._scoring.probes[1] else None

    def next_span(self) -> RowSpan:
        first, end = self.block_start - self.shift, self.block_end - self.shift
        if self._is_masked_by_blocks:  # attention then takes the outputs for the row's last ones
            end = len(self)
        return RowSpan(0, len(self), len(self), first, end - first)

    def open_positions(self) -> NDArray[np.int64]:
        return self._probe.scored.numpy()

    def targets(self, positions: NDArray[np.int64]) -> Tensor:
        return torch.tensor(self.request.prompt_ids)[torch.from_numpy(positions)]

    def num_committed(self, decision: Decision) -> int:  # noqa: ARG002 - it scores
        return 0

    def apply(self, decision: Decision) -> None:
        """Note what a probe told, and go to the next or send all of it."""
        assert decision.logprobs is not None
        self.begun_pass = None
        self._count_pass(decision.span)
        self._note_logprobs(decision, decision.logprobs)
        for position in decision.positions.tolist():
            told = self._logprobs.take(position)
            assert told is not None
            self._score(position, told)
        self._probe_number += 1
        if self.finish_reason is None:
            self._enter_block(0)
            return
        scores = tuple(
            self._scores.get(p) or TokenLogprob(self.request.prompt_ids[p], 0.0, 0, ())
            for p in self._told_positions()
        )
        self.sink(GenerationEvent((), self.stats, self.finish_reason, None, scores))

    def _told_positions(self) -> range:
        """Those of the probes that were this row's."""
        context = self._scoring.context
        if self._scoring.method in ("chain", "pseudo"):
            first, end = self._scoring.probes
            return range(context + first, context + end)
        return range(context, self.prompt_length)

    def _score(self, position: int, told: TokenLogprob) -> None:
        token, weight = self.request.prompt_ids[position], self._probe.weight
        if self._scoring.method != "monte_carlo":
            self._scores[position] = TokenLogprob(token, told.logprob, told.rank, told.top)
            return
        before = self._scores.get(position)
        score = TokenLogprob(token, weight * told.logprob, told.rank, _weighted(told, weight))
        self._scores[position] = score if before is None else add_scores(before, score)


def _weighted(told: TokenLogprob, weight: float) -> tuple[tuple[int, float], ...]:
    """The likeliest token only: of the others not every sample tells."""
    return tuple((token, weight * logprob) for token, logprob in told.top[:1])


def add_scores(one: TokenLogprob, other: TokenLogprob) -> TokenLogprob:
    """The sum of two parts of a Monte Carlo score."""
    if not one.rank or not other.rank:
        return one if one.rank else other
    worse = max(one, other, key=lambda part: part.rank)
    top = worse.top and ((worse.top[0][0], one.top[0][1] + other.top[0][1]),)
    return TokenLogprob(one.token_id, one.logprob + other.logprob, worse.rank, top)
