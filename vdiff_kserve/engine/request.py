"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate.

    Attributes:
        prompt_ids: token ids of the whole prompt; at least one.
        max_tokens: masked positions after the prompt.
        decoding: how to fill them.
        end_token_ids: tokens that end the answer; empty to fill the whole canvas.
        request_id: for logs.
        priority: lower goes first; within one priority, first come, first served.
        deadline: when to give up, on the clock of `time.monotonic`; None never.
        grammar: what the answer must match, as llguidance reads it; None is anything.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    decoding: DecodingParams
    end_token_ids: tuple[int, ...] = ()
    request_id: str = ""
    priority: int = 0
    deadline: float | None = None
    grammar: str | None = None


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
class GenerationEvent:
    """Tokens that became final, left to right.

    Attributes:
        token_ids: newly committed tokens left of the frontier, the end token excluded; never empty
            but on the last event.
        finish_reason: set on the last event only: `stop` when an end token was committed, else
            `length`.
        end_token_id: the end token, on a last event whose reason is `stop`.
        stats: what the answer has cost so far.
        logprobs: one for each of the tokens, the end token included; empty when not asked for.
    """

    token_ids: tuple[int, ...]
    stats: GenerationStats
    finish_reason: FinishReason | None = None
    end_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer, without its end token."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats


EventSink = Callable[[GenerationEvent | EngineError], None]
"""Receives a request's events on the engine's thread; must not block or raise."""
