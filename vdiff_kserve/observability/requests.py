"""One record per request: it fills the metrics and writes one log line. Texts are never logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cache
from http import HTTPStatus

from vdiff_kserve.engine import (
    GenerationStats,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.observability import families

logger = logging.getLogger("kserve.vdiff.requests")

CLIENT_CLOSED = 499
"""Status of a request whose client went away, as nginx logs it."""

ERROR_TYPES: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "invalid_request",
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.NOT_FOUND: "unknown_model",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limited",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
    CLIENT_CLOSED: "client_closed",
}
"""What `vdiff_errors_total` calls a status; all others are `internal`."""


def error_type(status: int, error: BaseException | None) -> str:
    """The `type` in `vdiff_errors_total` of a request that ended with this status and error."""
    for reason in (error, error and error.__cause__):
        if isinstance(reason, QueueFullError):
            return "queue_full"
        if isinstance(reason, QueueTimeoutError):
            return "queue_timeout"
        if isinstance(reason, RequestTimeoutError):
            return "request_timeout"
    return ERROR_TYPES.get(status, "internal")


class RequestMetrics:
    """One model's share of what requests are counted by. All series are there from the start, so
    that the first request of a kind is seen as a rise."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        for endpoint in families.ENDPOINTS:
            families.REQUEST_SUCCESS.labels(model_name, endpoint)
            for kind in families.ERROR_TYPES:
                families.ERRORS.labels(model_name, endpoint, kind)
        for reason in families.FINISH_REASONS:
            families.ANSWERS.labels(model_name, reason)
        self.latency = families.LATENCY.labels(model_name)
        self.first_text = families.FIRST_TEXT.labels(model_name)
        self.queue_time = families.QUEUE_TIME.labels(model_name)
        self.inter_chunk = families.INTER_CHUNK.labels(model_name)
        self.running_time = families.RUNNING_TIME.labels(model_name)
        self.running_to_text = families.RUNNING_TO_TEXT.labels(model_name)
        self.running_from_text = families.RUNNING_FROM_TEXT.labels(model_name)
        self.time_per_token = families.TIME_PER_TOKEN.labels(model_name)
        self.prompt_tokens = families.PROMPT_TOKENS.labels(model_name)
        self.generation_tokens = families.GENERATION_TOKENS.labels(model_name)
        self.answer_prompt_tokens = families.ANSWER_PROMPT_TOKENS.labels(model_name)
        self.answer_generation_tokens = families.ANSWER_GENERATION_TOKENS.labels(model_name)
        self.tokens_per_forward = families.TOKENS_PER_FORWARD.labels(model_name)
        self.prefix_queried = families.PREFIX_QUERIED.labels(model_name)
        self.prefix_hit = families.PREFIX_HIT.labels(model_name)

    def succeeded(self, endpoint: str) -> None:
        """A request is answered."""
        families.REQUEST_SUCCESS.labels(self._model_name, endpoint).inc()

    def failed(self, endpoint: str, kind: str, count: int = 1) -> None:
        """Requests ended without their answers."""
        families.ERRORS.labels(self._model_name, endpoint, kind).inc(count)

    def ended(self, finish_reason: str, count: int = 1) -> None:
        """Answers ended."""
        families.ANSWERS.labels(self._model_name, finish_reason).inc(count)


metrics_of = cache(RequestMetrics)
"""The metrics of a model, by its name."""


class AnswerRecord:
    """One answer of a request: what was heard of it, stamped when it was heard."""

    def __init__(self, metrics: RequestMetrics, arrived: float, prompt_tokens: int) -> None:
        self.tokens = 0
        self.nfe = 0
        self.finish_reason: str | None = None
        self._metrics = metrics
        self._arrived = arrived
        self._prompt_tokens = prompt_tokens
        self._begun = False
        self._first_text: float | None = None
        self._latest_text: float | None = None

    def heard(self, stats: GenerationStats, tokens: int, has_text: bool) -> None:
        """Tokens of the answer became final.

        Args:
            stats: what the answer has cost so far.
            tokens: of the answer so far.
            has_text: whether they made text that can be sent.
        """
        if not self._begun:
            self._begun = True
            self._metrics.queue_time.observe(stats.queue_seconds)
            self._metrics.prefix_queried.inc(self._prompt_tokens)
            self._metrics.prefix_hit.inc(stats.cached_tokens)
        self._metrics.generation_tokens.inc(max(0, tokens - self.tokens))
        self.tokens = tokens
        self.nfe = stats.nfe
        if has_text:
            now = time.perf_counter()
            if self._latest_text is None:
                self._first_text = now
            else:
                self._metrics.inter_chunk.observe(now - self._latest_text)
            self._latest_text = now

    def finished(self, finish_reason: str, stats: GenerationStats) -> None:
        """The answer is complete."""
        self.finish_reason = finish_reason
        metrics = self._metrics
        metrics.ended(finish_reason)
        metrics.answer_prompt_tokens.observe(self._prompt_tokens)
        metrics.answer_generation_tokens.observe(self.tokens)
        metrics.tokens_per_forward.observe(self.tokens / self.nfe if self.nfe else 0.0)
        now = time.perf_counter()
        busy = max(0.0, now - self._arrived - stats.queue_seconds)
        after_text = 0.0 if self._first_text is None else min(busy, now - self._first_text)
        metrics.running_time.observe(busy)
        metrics.running_to_text.observe(busy - after_text)
        metrics.running_from_text.observe(after_text)
        if self.tokens:
            metrics.time_per_token.observe(busy / self.tokens)


class RequestRecord:
    """What is known of a request so far.

    Attributes:
        code: HTTP status; None until the request failed or `close` found that it succeeded.
    """

    def __init__(
        self,
        model_name: str,
        endpoint: str,
        request_id: str,
        prompt_tokens: int,
        answer_prompts: Sequence[int],
        arrived: float,
    ) -> None:
        """Begin the record of a request that the engine has queued.

        Args:
            endpoint: which protocol asked: one of `families.ENDPOINTS`.
            prompt_tokens: of all its prompts.
            answer_prompts: prompt tokens of each of its answers.
            arrived: when it came, by `time.perf_counter`.
        """
        self.code: int | None = None
        self._endpoint = endpoint
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._metrics = metrics_of(model_name)
        self._answers = [AnswerRecord(self._metrics, arrived, n) for n in answer_prompts]
        self._first_text: float | None = None
        self._ended: float | None = None
        self._error_type = ""
        self._metrics.prompt_tokens.inc(prompt_tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every answer ended by itself."""
        return all(answer.finish_reason is not None for answer in self._answers)

    def heard(
        self,
        index: int,
        stats: GenerationStats,
        tokens: int,
        has_text: bool,
        finish_reason: str | None,
    ) -> None:
        """Tokens of the answer `index` became final; see `AnswerRecord`."""
        if has_text and self._first_text is None:
            self._first_text = time.perf_counter() - self._arrived
            self._metrics.first_text.observe(self._first_text)
        answer = self._answers[index]
        answer.heard(stats, tokens, has_text)
        if finish_reason is not None:
            answer.finished(finish_reason, stats)
            if self.is_complete:
                self._ended = time.perf_counter() - self._arrived

    def fail(self, status: int, error: BaseException | None) -> None:
        """The request ends with a status that is not success; the first one counts."""
        if self.code is None:
            self.code = status
            self._error_type = error_type(status, error)

    def close(self) -> None:
        """The request is over. One that is not complete and did not fail lost its client."""
        if self._ended is None:
            self.fail(CLIENT_CLOSED, None)
        self._count()
        seconds = time.perf_counter() - self._arrived
        reasons = [a.finish_reason for a in self._answers if a.finish_reason is not None]
        logger.info(
            "%s %s %d: %d prompt tokens, %s, first text %s, %.3f s, %s",
            self._endpoint,
            self._request_id,
            self.code,
            self._prompt_tokens,
            self._cost(),
            "never" if self._first_text is None else f"after {self._first_text:.3f} s",
            seconds,
            "+".join(reasons) or "no answer",
            extra={"fields": self._fields(seconds, reasons)},
        )

    def _fields(self, seconds: float, reasons: Sequence[str]) -> dict[str, object]:
        """The line's facts, for programs; tokens and forwards as in `_cost`."""
        first_text = self._first_text
        return {
            "endpoint": self._endpoint,
            "request_id": self._request_id,
            "status": self.code,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sum(answer.tokens for answer in self._answers),
            "forwards": sum(answer.nfe for answer in self._answers) if self.is_complete else None,
            "first_text_seconds": first_text if first_text is None else round(first_text, 4),
            "seconds": round(seconds, 4),
            "finish_reasons": list(reasons),
        }

    def _cost(self) -> str:
        """What the answers cost. Of one that ended early, only what became final was heard: not the
        forward passes since, nor tokens to the right of a mask."""
        tokens = sum(answer.tokens for answer in self._answers)
        if not self.is_complete:
            return f"unfinished after {tokens} final tokens"
        return f"{tokens} tokens in {sum(answer.nfe for answer in self._answers)} forwards"

    def _count(self) -> None:
        unfinished = sum(answer.finish_reason is None for answer in self._answers)
        if self.code is None and self._ended is not None:
            self.code = HTTPStatus.OK
            self._metrics.succeeded(self._endpoint)
            self._metrics.latency.observe(self._ended)
        else:
            self._metrics.failed(self._endpoint, self._error_type)
            reason = "abort" if self.code == CLIENT_CLOSED else "error"
            self._metrics.ended(reason, unfinished)


def count_refusal(
    model_name: str, endpoint: str, status: int, error: BaseException, count: int = 1
) -> None:
    """Count requests that were refused before they cost anything."""
    metrics_of(model_name).failed(endpoint, error_type(status, error), count)
