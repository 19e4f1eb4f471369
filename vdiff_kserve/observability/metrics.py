"""What Prometheus sees of the server. Every name begins with `vdiff_`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)

REQUESTS = Counter(
    "vdiff_requests", "Requests by the status that ended them.", ["model_name", "endpoint", "code"]
)
ANSWERS = Counter(
    "vdiff_answers",
    "Answers (choices) by what ended them: stop, length, abort or error.",
    ["model_name", "finish_reason"],
)
PROMPT_TOKENS = Counter("vdiff_prompt_tokens", "Tokens of prompts.", ["model_name"])
GENERATED_TOKENS = Counter("vdiff_generation_tokens", "Tokens of answers.", ["model_name"])
FORWARDS = Counter(
    "vdiff_nfe", "Forward passes that answers took part in, as they happen.", ["model_name"]
)
FIRST_TEXT = Histogram(
    "vdiff_time_to_first_text_seconds",
    "From a request's arrival to its first committed text.",
    ["model_name"],
    buckets=SECONDS,
)
DURATION = Histogram(
    "vdiff_request_duration_seconds",
    "From a request's arrival to the end of its answers.",
    ["model_name"],
    buckets=SECONDS,
)
TOKENS_PER_FORWARD = Histogram(
    "vdiff_tokens_per_forward",
    "Generated tokens over forward passes, per answer.",
    ["model_name"],
    buckets=TOKENS,
)
RUNNING = Gauge("vdiff_requests_running", "Answers in the batch.", ["model_name"])
WAITING = Gauge("vdiff_requests_waiting", "Answers in the queue.", ["model_name"])


def watch_queue(model_name: str, running: Callable[[], int], waiting: Callable[[], int]) -> None:
    """Read the two gauges from the engine whenever they are asked for."""
    RUNNING.labels(model_name).set_function(running)
    WAITING.labels(model_name).set_function(waiting)


def render() -> bytes:
    """Every metric of the process in Prometheus's text format."""
    return generate_latest(REGISTRY)
