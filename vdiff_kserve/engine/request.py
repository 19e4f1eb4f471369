"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from vdiff_kserve.sampler.params import DecodingParams

FinishReason = Literal["stop", "length"]


class EngineError(Exception):
    """A request that the engine could not finish."""


class QueueFullError(EngineError):
    """The waiting queue has no place; try again later."""


class RequestTooLargeError(EngineError):
    """A request that needs more cache than the engine has."""


class QueueTimeoutError(EngineError):
    """The request's deadline passed while it waited."""


class RequestTimeoutError(EngineError):
    """The request's deadline passed while it ran."""


class EngineStoppedError(EngineError):
    """The engine is not running, or stopped before the request was done."""


ScoringMethod = Literal["chain", "pseudo", "monte_carlo", "causal"]


@dataclass(frozen=True)
class Scoring:
    """How a prompt's tokens are scored, where no answer is generated.

    Every probe is one forward pass over the prompt with some positions masked, and tells how likely
    the tokens there are. The positions of the first `context` tokens are never masked or scored.

    Attributes:
        method: what the probes mask.
            `chain`: a position and all right of it; the scores sum to the log likelihood of the
            text written from left to right.
            `pseudo`: one position only, so that each token is scored given all others.
            `monte_carlo`: random positions, as many as is drawn; the scores sum to an estimate of
            the likelihood's bound (LLaDA, arXiv 2502.09992, equation 6).
            `causal`: nothing; a causal model tells all tokens in one pass.
        context: tokens that are not scored, at least 1.
        probes: the part of the probes that this request runs, first and behind the last: numbered
            by position from `context` on, or by sample.
        samples: samples that `monte_carlo` draws in all.
        seed: of its random numbers.
    """

    method: ScoringMethod
    context: int
    probes: tuple[int, int]
    samples: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate, or one text to score.

    Attributes:
        prompt_ids: token ids of the whole prompt; at least one.
        max_tokens: positions after the prompt.
        decoding: how to fill them.
        end_token_ids: tokens that end the answer; empty to fill the whole canvas.
        request_id: for logs.
        priority: lower goes first; within one priority, first come, first served.
        deadline: when to give up, on the clock of `time.monotonic`; None never.
        grammar: what the answer must match, as llguidance reads it; None is anything.
        given: tokens that stand behind the prompt from the beginning and never change, -1 for a
            mask; empty, or as long as `max_tokens` with at least one mask.
        infills: the given tokens are the text around holes: the answer is what fills the holes, and
            an end token ends the text of its own hole only.
        judged: tell how likely the text of a hole is together with what follows it, to compare it
            with others; needs `infills`, one hole, and `top_logprobs`.
        draft: what the answer will probably be, -1 for a token that is not known. What the model
            would write itself is accepted, the rest is decoded.
        scoring: score the prompt; nothing is generated.
        watched: tell every step, not only what became final; needs `top_logprobs`.

    Raises:
        ValueError: `given` has the wrong length or no mask, or log probabilities are missing.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    decoding: DecodingParams
    end_token_ids: tuple[int, ...] = ()
    request_id: str = ""
    priority: int = 0
    deadline: float | None = None
    grammar: str | None = None
    given: tuple[int, ...] = ()
    infills: bool = False
    judged: bool = False
    draft: tuple[int, ...] = ()
    scoring: Scoring | None = None
    watched: bool = False

    def __post_init__(self) -> None:
        if self.given and (len(self.given) != self.max_tokens or min(self.given) >= 0):
            raise ValueError("given must be as long as max_tokens and leave a mask")
        if (self.watched or self.judged) and self.decoding.top_logprobs is None:
            raise ValueError("a request that is watched or judged needs top_logprobs")


@dataclass(frozen=True)
class GenerationStats:
    """What an answer cost.

    Attributes:
        refreshes: forward passes over the whole visible canvas.
        reuses: forward passes over a part of it, the rest read from the cache.
        commits: forward passes that also keep the final keys and values of a finished block.
        auxiliary: forward passes of the auxiliary model.
        steps: denoising steps that committed tokens.
        completion_tokens: generated tokens up to and including the end token.
        queue_seconds: how long the request waited for its place in the batch.
        encoder: passes of a model's encoder, which reads the prompt and finished canvases.
        cached_tokens: prompt tokens whose keys and values an earlier request left behind.
        accepted: tokens of the draft that are in the answer.
    """

    refreshes: int
    reuses: int
    commits: int
    auxiliary: int
    steps: int
    completion_tokens: int
    queue_seconds: float = field(default=0.0, compare=False)
    cached_tokens: int = 0
    encoder: int = 0
    accepted: int = 0

    def plus(self, other: GenerationStats) -> GenerationStats:
        """What both cost together; the tokens are those of this one."""
        return replace(
            self,
            refreshes=self.refreshes + other.refreshes,
            reuses=self.reuses + other.reuses,
            commits=self.commits + other.commits,
            auxiliary=self.auxiliary + other.auxiliary,
            encoder=self.encoder + other.encoder,
            steps=self.steps + other.steps,
            queue_seconds=max(self.queue_seconds, other.queue_seconds),
        )

    @property
    def nfe(self) -> int:
        """Forward passes of the diffusion model that the request took part in."""
        return self.refreshes + self.reuses + self.commits

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.nfe if self.nfe else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was to the model when it was committed, before any filter or constraint.

    Attributes:
        rank: its rank among the tokens that may be written, from 1.
        top: the likeliest tokens with their log probabilities, likeliest first; as many as the
            request's `top_logprobs`.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepView:
    """What one denoising step wrote.

    Attributes:
        step: its number, from 1.
        positions: places in the answer, from 0, ascending.
        token_ids: what stands there now.
        confidence: probability of each token when it was written.
        masks: positions of the answer that are still masked.
        masked_again: places whose tokens were taken back.
    """

    step: int
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]
    masks: int
    masked_again: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationEvent:
    """Tokens that became final, left to right; or, of a watched request, what a step wrote.

    Attributes:
        token_ids: newly committed tokens left of the frontier, the end token excluded; empty only
            on a last event, with `view`, or where an end token ends a hole.
        finish_reason: set on the last event only: `stop` when an end token was committed, else
            `length`.
        end_token_id: the end token, on a last event whose reason is `stop`, or where it ended the
            text of a hole.
        stats: what the answer has cost so far.
        logprobs: one for each of the tokens, the end token included; empty when not asked for. Of
            a request that scores, one for each scored position, on the only event.
        hole: which hole the tokens fill, for a request that infills.
        view: what the step wrote, before what it made final is told.
        score: on the last event of a request that is judged, the mean log probability of the hole's
            tokens and the first ones behind it.
    """

    token_ids: tuple[int, ...]
    stats: GenerationStats
    finish_reason: FinishReason | None = None
    end_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    hole: int = 0
    view: StepView | None = None
    score: float | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer, without its end token."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats


EventSink = Callable[[GenerationEvent | EngineError], None]
"""Receives a request's events on the engine's thread; must not block or raise."""
