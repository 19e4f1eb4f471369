"""What is counted of a request, and when."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from itertools import count

import pytest
from prometheus_client import REGISTRY

from tests.openai.engine import ScriptedEngine, service
from tests.openai.test_service import chat, completion
from vdiff_kserve.engine import (
    EngineError,
    EngineStoppedError,
    GenerationStats,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.observability import requests
from vdiff_kserve.observability.requests import RequestRecord, count_refusal
from vdiff_kserve.openai.errors import RequestError

NAMES = count()


class Clock:
    """`time.perf_counter` that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(requests, "time", clock)
    return clock


class Model:
    """A model name of its own, and what is counted under it."""

    def __init__(self) -> None:
        self.name = f"asked-{next(NAMES)}"

    def value(self, metric: str, **labels: str) -> float:
        found = REGISTRY.get_sample_value(metric, {"model_name": self.name, **labels})
        return 0 if found is None else found

    def timed(self, metric: str) -> tuple[float, float]:
        """How often something was timed, and the sum of it."""
        return self.value(f"{metric}_count"), self.value(f"{metric}_sum")

    def counted(self, metric: str, label: str) -> dict[str, float]:
        """Values above zero by one label, summed over the others."""
        counts: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                if sample.name == metric and sample.labels["model_name"] == self.name:
                    key = sample.labels[label]
                    counts[key] = counts.get(key, 0) + sample.value
        return {key: value for key, value in counts.items() if value}

    def record(self, clock: Clock, *answer_prompts: int) -> RequestRecord:
        prompts = answer_prompts or (5,)
        return RequestRecord(self.name, "chat", "id", sum(prompts), prompts, clock.now)


@pytest.fixture
def model() -> Model:
    return Model()


def stats(tokens: int, nfe: int = 1, queued: float = 0.0, cached: int = 0) -> GenerationStats:
    return GenerationStats(nfe, 0, 0, 0, nfe, tokens, queue_seconds=queued, cached_tokens=cached)


def test_times_are_taken_when_text_comes(clock: Clock, model: Model) -> None:
    record = model.record(clock)
    clock.now += 2
    record.heard(0, stats(3, queued=1.5), 3, has_text=False, finish_reason=None)
    assert model.timed("vdiff_queue_time_seconds") == (1, 1.5)
    assert model.timed("vdiff_time_to_first_text_seconds") == (0, 0)
    clock.now += 1
    record.heard(0, stats(4, queued=1.5), 4, has_text=True, finish_reason=None)
    assert model.timed("vdiff_time_to_first_text_seconds") == (1, 3)
    clock.now += 4
    record.heard(0, stats(8, queued=1.5), 8, has_text=True, finish_reason="stop")
    clock.now += 100
    record.close()
    assert model.timed("vdiff_time_to_first_text_seconds") == (1, 3)
    assert model.timed("vdiff_queue_time_seconds") == (1, 1.5)
    assert model.timed("vdiff_inter_chunk_seconds") == (1, 4)
    assert model.timed("vdiff_time_per_output_token_seconds") == (1, (7 - 1.5) / 8)
    assert model.timed("vdiff_running_seconds") == (1, 7 - 1.5)
    assert model.timed("vdiff_running_to_first_text_seconds") == (1, 3 - 1.5)
    assert model.timed("vdiff_running_from_first_text_seconds") == (1, 4)
    assert model.timed("vdiff_request_latency_seconds") == (1, 7)


def test_an_answer_without_text_runs_until_its_first_text_for_ever(
    clock: Clock, model: Model
) -> None:
    record = model.record(clock)
    clock.now += 3
    record.heard(0, stats(1, queued=1.0), 1, has_text=False, finish_reason="stop")
    assert model.timed("vdiff_running_to_first_text_seconds") == (1, 2)
    assert model.timed("vdiff_running_from_first_text_seconds") == (1, 0)


def test_tokens_are_counted_as_they_come(clock: Clock, model: Model) -> None:
    record = model.record(clock)
    assert model.value("vdiff_prompt_tokens_total") == 5
    record.heard(0, stats(3, cached=4), 3, has_text=True, finish_reason=None)
    assert model.value("vdiff_generation_tokens_total") == 3
    record.heard(0, stats(9, nfe=3, cached=4), 9, has_text=True, finish_reason="length")
    assert model.value("vdiff_generation_tokens_total") == 9
    assert model.timed("vdiff_tokens_per_forward") == (1, 3)
    assert model.timed("vdiff_answer_prompt_tokens") == (1, 5)
    assert model.timed("vdiff_answer_generation_tokens") == (1, 9)
    assert model.value("vdiff_prefix_cache_queried_tokens_total") == 5
    assert model.value("vdiff_prefix_cache_hit_tokens_total") == 4


def test_an_answer_cut_back_to_a_stop_string_takes_no_tokens_away(
    clock: Clock, model: Model
) -> None:
    record = model.record(clock)
    record.heard(0, stats(9), 9, has_text=True, finish_reason=None)
    record.heard(0, stats(12), 7, has_text=True, finish_reason="stop")
    assert model.value("vdiff_generation_tokens_total") == 9


def test_answers_of_one_request_are_timed_apart_and_end_together(
    clock: Clock, model: Model
) -> None:
    record = model.record(clock, 5, 6)
    clock.now += 1
    record.heard(0, stats(2, queued=0.5), 2, has_text=True, finish_reason="stop")
    clock.now += 1
    record.heard(1, stats(2, queued=1.0), 2, has_text=True, finish_reason="length")
    record.close()
    assert model.timed("vdiff_time_to_first_text_seconds") == (1, 1)
    assert model.timed("vdiff_queue_time_seconds") == (2, 1.5)
    assert model.timed("vdiff_inter_chunk_seconds") == (0, 0)
    assert model.timed("vdiff_request_latency_seconds") == (1, 2)
    assert model.counted("vdiff_request_success_total", "endpoint") == {"chat": 1}
    assert model.counted("vdiff_answers_total", "finish_reason") == {"stop": 1, "length": 1}
    assert model.timed("vdiff_answer_prompt_tokens") == (2, 11)


def test_a_request_given_up_is_no_success_and_has_no_latency(clock: Clock, model: Model) -> None:
    record = model.record(clock, 5, 5)
    record.heard(0, stats(2), 2, has_text=True, finish_reason="stop")
    record.close()
    assert record.code == 499
    assert model.counted("vdiff_errors_total", "type") == {"client_closed": 1}
    assert model.counted("vdiff_answers_total", "finish_reason") == {"stop": 1, "abort": 1}
    assert model.counted("vdiff_request_success_total", "endpoint") == {}
    assert model.timed("vdiff_request_latency_seconds") == (0, 0)


def test_an_empty_answer_has_no_time_per_token(clock: Clock, model: Model) -> None:
    record = model.record(clock)
    record.heard(0, stats(0), 0, has_text=False, finish_reason="stop")
    record.close()
    assert model.timed("vdiff_time_per_output_token_seconds") == (0, 0)
    assert model.counted("vdiff_request_success_total", "endpoint") == {"chat": 1}


def test_every_series_is_there_before_the_first_request(clock: Clock, model: Model) -> None:
    count_refusal(model.name, "v1", 400, ValueError())
    labels = {"model_name": model.name, "endpoint": "chat"}
    assert REGISTRY.get_sample_value("vdiff_request_success_total", labels) == 0
    labels |= {"type": "request_timeout"}
    assert REGISTRY.get_sample_value("vdiff_errors_total", labels) == 0


def as_refusal(cause: EngineError, status: int) -> RequestError:
    """The refusal that stands for an engine's error, as services raise it."""
    refusal = RequestError("no", status=HTTPStatus(status))
    refusal.__cause__ = cause
    return refusal


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, RequestError("no"), "invalid_request"),
        (429, as_refusal(QueueFullError(), 429), "queue_full"),
        (503, as_refusal(EngineStoppedError(), 503), "unavailable"),
        (503, as_refusal(QueueTimeoutError(), 503), "queue_timeout"),
        (503, as_refusal(RequestTimeoutError(), 503), "request_timeout"),
        (503, QueueTimeoutError(), "queue_timeout"),
        (500, as_refusal(EngineError(), 500), "internal"),
        (500, LookupError(), "internal"),
        (418, None, "internal"),
    ],
)
def test_errors_are_told_apart(
    status: int, error: Exception | None, kind: str, model: Model
) -> None:
    count_refusal(model.name, "chat", status, error, 3)
    assert model.counted("vdiff_errors_total", "type") == {kind: 3}


async def test_a_refusal_counts_every_request_it_refuses(model: Model) -> None:
    tiny = service(ScriptedEngine(refusal=QueueFullError("full")))
    tiny._name = model.name
    with pytest.raises(RequestError):
        await tiny.answer([completion(), completion()], "v1")
    assert model.counted("vdiff_errors_total", "type") == {"queue_full": 2}
    assert model.counted("vdiff_errors_total", "endpoint") == {"v1": 2}
    assert model.value("vdiff_prompt_tokens_total") == 0


async def test_a_request_that_fails_is_an_error(model: Model) -> None:
    tiny = service(ScriptedEngine(["abc", EngineError("broken")]))
    tiny._name = model.name
    with pytest.raises(RequestError):
        await tiny.respond(chat())
    assert model.counted("vdiff_errors_total", "type") == {"internal": 1}
    assert model.counted("vdiff_answers_total", "finish_reason") == {"error": 1}
    assert model.value("vdiff_generation_tokens_total") == 3


async def test_a_stream_that_fails_is_an_error(model: Model) -> None:
    tiny = service(ScriptedEngine(["abc", QueueTimeoutError("late")]))
    tiny._name = model.name
    assert len([event async for event in await tiny.respond(chat(stream=True))]) == 3
    assert model.counted("vdiff_errors_total", "type") == {"queue_timeout": 1}
    assert model.counted("vdiff_answers_total", "finish_reason") == {"error": 1}


async def test_a_client_that_leaves_after_the_last_text_was_served(model: Model) -> None:
    tiny = service(ScriptedEngine(["abc"]))
    tiny._name = model.name
    stream = await tiny.respond(chat(stream=True))
    await anext(stream)
    await stream.aclose()
    assert model.counted("vdiff_request_success_total", "endpoint") == {"chat": 1}
    assert model.counted("vdiff_errors_total", "type") == {}


async def test_requests_answered_together_are_heard_as_they_come(model: Model) -> None:
    """The second is not kept waiting by the first, which never ends."""
    tiny = service(ScriptedEngine([None], ["ab", "cd"]))
    tiny._name = model.name
    task = asyncio.create_task(tiny.answer([completion(), completion()], "v1"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert model.counted("vdiff_answers_total", "finish_reason") == {"length": 1}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.counted("vdiff_request_success_total", "endpoint") == {"v1": 1}
    assert model.counted("vdiff_errors_total", "type") == {"client_closed": 1}


async def test_each_answer_has_the_length_of_its_own_prompt(model: Model) -> None:
    tiny = service(ScriptedEngine(*[["ab"]] * 4))
    tiny._name = model.name
    await tiny.respond(completion(prompt=["x", "yzz"], n=2, temperature=1))
    assert model.value("vdiff_prompt_tokens_total") == 4
    assert model.timed("vdiff_answer_prompt_tokens") == (4, 8)
    assert model.value("vdiff_prefix_cache_queried_tokens_total") == 8


async def test_arrival_is_before_the_prompt_is_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = service(ScriptedEngine(["ab"]))
    tiny._name = model.name
    read = tiny._intake.job

    async def slowly(request: object) -> object:
        clock.now += 30
        return await read(request)

    clock = Clock()
    monkeypatch.setattr("vdiff_kserve.openai.service.time", clock)
    monkeypatch.setattr(requests, "time", clock)
    monkeypatch.setattr(tiny._intake, "job", slowly)
    await tiny.respond(chat())
    assert model.timed("vdiff_request_latency_seconds") == (1, 30)


def test_the_log_has_numbers_and_no_text(
    clock: Clock, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    record = model.record(clock)
    clock.now += 0.5
    record.heard(0, stats(4, nfe=2), 4, has_text=True, finish_reason="stop")
    with caplog.at_level(logging.INFO, "kserve.vdiff.requests"):
        record.close()
    tokens, times = "5 prompt tokens, 4 tokens in 2 forwards", "first text after 0.500 s, 0.500 s"
    assert caplog.messages == [f"chat id 200: {tokens}, {times}, stop"]


@pytest.mark.parametrize("status", [None, 503, 504])
def test_the_log_does_not_tell_what_an_unfinished_request_cost(
    clock: Clock, model: Model, caplog: pytest.LogCaptureFixture, status: int | None
) -> None:
    """What it computed behind the last final token was not heard."""
    record = model.record(clock)
    record.heard(0, stats(4, nfe=2), 4, has_text=False, finish_reason=None)
    clock.now += 1.5
    if status is not None:
        record.fail(status, None)
    with caplog.at_level(logging.INFO, "kserve.vdiff.requests"):
        record.close()
    cost = "5 prompt tokens, unfinished after 4 final tokens"
    code = 499 if status is None else status
    assert caplog.messages == [f"chat id {code}: {cost}, first text never, 1.500 s, no answer"]
