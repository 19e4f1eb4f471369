"""One record per request: it fills the metrics and writes one log line. Texts are never logged."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from vdiff_kserve.observability import metrics

logger = logging.getLogger("kserve.vdiff.requests")

CLIENT_CLOSED = 499
"""Status of a request whose client went away, as nginx logs it."""


@dataclass
class RequestRecord:
    """What is known of a request so far.

    Attributes:
        endpoint: which protocol asked: chat, completion, v1 or v2.
        code: HTTP status; that of a client gone away until `close` says otherwise.
    """

    model_name: str
    endpoint: str
    request_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nfe: int = 0
    first_text: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    code: int = CLIENT_CLOSED
    started: float = field(default_factory=time.perf_counter)

    def forwards(self, count: int) -> None:
        """Count forward passes of the model as they are heard of."""
        self.nfe += count
        metrics.FORWARDS.labels(self.model_name).inc(count)

    def text(self) -> None:
        """Committed text is there to be sent."""
        if self.first_text is None:
            self.first_text = time.perf_counter() - self.started
            metrics.FIRST_TEXT.labels(self.model_name).observe(self.first_text)

    def answer(self, finish_reason: str, completion_tokens: int, tokens_per_forward: float) -> None:
        """An answer is complete."""
        self.finish_reasons.append(finish_reason)
        self.completion_tokens += completion_tokens
        metrics.ANSWERS.labels(self.model_name, finish_reason).inc()
        metrics.TOKENS_PER_FORWARD.labels(self.model_name).observe(tokens_per_forward)

    def unfinished(self, count: int) -> None:
        """Answers that ended before they were complete."""
        if count:
            reason = "abort" if self.code == CLIENT_CLOSED else "error"
            metrics.ANSWERS.labels(self.model_name, reason).inc(count)

    def close(self) -> None:
        """The request is over."""
        seconds = time.perf_counter() - self.started
        metrics.REQUESTS.labels(self.model_name, self.endpoint, str(self.code)).inc()
        metrics.PROMPT_TOKENS.labels(self.model_name).inc(self.prompt_tokens)
        metrics.GENERATED_TOKENS.labels(self.model_name).inc(self.completion_tokens)
        if self.finish_reasons:
            metrics.DURATION.labels(self.model_name).observe(seconds)
        logger.info(
            "%s %s %d: %d prompt tokens, %d tokens in %d forwards, first text %s, %.3f s, %s",
            self.endpoint,
            self.request_id,
            self.code,
            self.prompt_tokens,
            self.completion_tokens,
            self.nfe,
            "never" if self.first_text is None else f"after {self.first_text:.3f} s",
            seconds,
            "+".join(self.finish_reasons) or "no answer",
        )


def count_refusal(model_name: str, endpoint: str, code: int) -> None:
    """Count a request that was refused before it cost anything."""
    metrics.REQUESTS.labels(model_name, endpoint, str(code)).inc()
