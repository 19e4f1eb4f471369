"""Decoding without masks: canvases that begin as random tokens and are written whole.

DiffusionGemma's sampler with renoising, as published in transformers. A step keeps the drawn tokens
of the least uncertain positions, up to a bound of entropy (arXiv 2505.24857), and puts new random
tokens in the place of all others. A canvas is done when its likeliest tokens are stable and sure;
these are what is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdiff_kserve.engine.request import EventSink, GenerationRequest, GenerationStats
from vdiff_kserve.engine.row import Decision, PassKind, Row
from vdiff_kserve.models import ModelSpec, Renoising, RowSpan
from vdiff_kserve.sampler import random_tokens, seed_of_draw


@dataclass(frozen=True, kw_only=True)
class CanvasDecision(Decision):
    """What one step decided for one row; it writes the canvas when that is done.

    Attributes:
        noisy: int64 [canvas], what the next step starts from.
        likeliest: int64 [canvas], the most likely token of each position.
        soft: [canvas, hidden_size], what the next step is conditioned on.
        encoded: whether the encoder ran before.
    """

    noisy: Tensor
    likeliest: Tensor
    soft: Tensor
    encoded: bool


class RenoiseRow(Row):
    """A request of a model that is denoised from random tokens.

    A pass over the canvas reads all before it from the cache. The first one of a canvas comes after
    a pass of the encoder, which leaves the keys and values of what is not yet in the cache.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        assert spec.renoising is not None
        self.renoising: Renoising = spec.renoising
        self._canvas_tokens = spec.block_length
        self._vocab_size = spec.decoder.vocab_size
        self._draws = 0
        self._encoded = 0
        self._encoder_passes = 0
        super().__init__(request, sink, spec)

    def _canvas_length(self, spec: ModelSpec) -> int:
        canvases = -(-self.request.max_tokens // spec.block_length)
        return self.prompt_length + canvases * spec.block_length

    def _enter_block(self, start: int) -> None:
        self.block_start = start
        self.block_end = start + self._canvas_tokens
        self._block_step = 0
        self._block_passes = 0
        self.soft: Tensor | None = None
        self._history: list[Tensor] = []
        self.noisy = self.draw_canvas(self._draws)

    def draw_canvas(self, number: int) -> Tensor:
        """Random tokens for the canvas, another set for each number: int64 [canvas]."""
        positions = torch.arange(self.block_start, self.block_end)
        return random_tokens(self.params.seed, positions, number, self._vocab_size)

    @property
    def cache_runs(self) -> int:
        """The decoder reads the prompt from nowhere else."""
        return 1

    @property
    def draws(self) -> int:
        """Sets of random tokens that were drawn so far, the canvas's first one included."""
        return self._draws + 1

    @property
    def max_steps(self) -> int:
        """Most denoising steps of a canvas: a request's steps are for all of its canvases."""
        if self.params.steps is None:
            return self.renoising.max_steps
        canvases = (len(self) - self.prompt_length) // self._canvas_tokens
        return max(1, round(self.params.steps / canvases))

    @property
    def steps_left(self) -> int:
        """Denoising steps that the canvas may take, the next one included."""
        return self.max_steps - self._block_step

    @property
    def temperature(self) -> Tensor:
        """What the next step divides its logits by: float32 []."""
        span = self.renoising.t_max - self.renoising.t_min
        left = torch.tensor(self.steps_left, dtype=torch.int32) / self.max_steps
        return self.renoising.t_min + span * left

    @property
    def step_seed(self) -> int:
        """The sets of random tokens that canvases begin with are counted too."""
        return seed_of_draw(self.params.seed, self._draws)

    def is_done(self, likeliest: Tensor, entropy: float) -> bool:
        """Whether a step with these tokens and this mean entropy is the canvas's last."""
        if self.steps_left == 1:
            return True
        steps = self.renoising.stability_threshold
        before = self._history[-steps:] if steps else []
        stable = len(before) == steps and all(torch.equal(each, likeliest) for each in before)
        return stable and entropy < self.renoising.confidence_threshold

    def encoder_span(self) -> RowSpan | None:
        """What the encoder has to read before the next step; None when that is nothing."""
        start, end = max(self._encoded, self.cached_tokens), self.block_start
        if start == end:
            return None
        return RowSpan(start, end - start, end, end - 1, 1, self.cache_offsets[0])

    def canvas_span(self) -> RowSpan:
        """The decoder's pass."""
        start, length = self.block_start, self._canvas_tokens
        return RowSpan(start, length, self.block_end, start, length, self.cache_offsets[0])

    def next_span(self) -> RowSpan:
        start = self.block_start
        if self.cache_offsets and (read := self.encoder_span()) is not None:
            start = read.start
        queries, length = self.block_end - start, self._canvas_tokens
        offset = self.cache_offsets[0] if self.cache_offsets else None
        return RowSpan(start, queries, self.block_end, self.block_start, length, offset)

    @property
    def refreshes_next(self) -> bool:
        return self.is_fresh

    @property
    def shares_prefix(self) -> bool:
        return True

    @property
    def final_tokens(self) -> int:
        return self._encoded

    @property
    def reusable_prompt(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def stats(self) -> GenerationStats:
        return replace(super().stats, encoder=self._encoder_passes)

    def apply(self, decision: Decision) -> None:
        assert isinstance(decision, CanvasDecision)
        self._encoded = self.block_start
        self._encoder_passes += decision.encoded
        self._draws += 1
        self._history.append(decision.likeliest)
        self.noisy, self.soft = decision.noisy, decision.soft
        if len(decision.positions):
            self._draws += 1  # the next canvas begins with a set of its own
        super().apply(decision)

    def _kind_of(self, span: RowSpan) -> PassKind:  # noqa: ARG002
        return "reuse"

    def _skip_idle_steps(self) -> None:
        """Every step computes a new canvas."""
