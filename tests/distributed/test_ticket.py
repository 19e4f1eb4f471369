"""What a client has of its answer when the replica behind it changes."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import replace

import pytest

from vdiff_kserve.distributed.ticket import LOSSES_TO_ISOLATE, DivergedError, Ticket
from vdiff_kserve.engine import (
    EngineError,
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
    GenerationStream,
    StepView,
    TokenLogprob,
)
from vdiff_kserve.sampler import Constraints, DecodingParams

STATS = GenerationStats(refreshes=1, reuses=0, commits=0, auxiliary=0, steps=1, completion_tokens=1)


def request(**changes: object) -> GenerationRequest:
    given = {"prompt_ids": (1, 2), "max_tokens": 8, "decoding": DecodingParams(seed=3)}
    return GenerationRequest(**(given | changes))


def ticket(**changes: object) -> Ticket:
    return Ticket(0, request(**changes), GenerationStream(), work=80)


def event(*tokens: int, finish: str | None = None) -> GenerationEvent:
    logprobs = tuple(TokenLogprob(token, -1.0, 1, ()) for token in tokens)
    return GenerationEvent(tokens, STATS, finish, logprobs=logprobs)


async def told(stream: GenerationStream) -> list[GenerationEvent]:
    return [each async for each in stream]


async def test_an_answer_that_is_run_once_passes_unchanged() -> None:
    one = ticket()
    events = [event(5), event(6, 7), event(8, finish="length")]
    for each in events:
        one.put(each)
    assert await told(one.stream) == events
    assert one.done


@pytest.mark.parametrize("second", [[(5, 6, 7, 8)], [(5,), (6,), (7,), (8,)], [(5, 6), (7, 8)]])
async def test_a_second_run_continues_where_the_first_stopped(second: list[tuple]) -> None:
    one = ticket()
    one.begin()
    one.put(event(5))
    one.put(event(6, 7))
    one.begin()
    for tokens in second[:-1]:
        one.put(event(*tokens))
    one.put(event(*second[-1], finish="length"))
    events = await told(one.stream)
    assert [token for each in events for token in each.token_ids] == [5, 6, 7, 8]
    assert [token.token_id for each in events for token in each.logprobs] == [5, 6, 7, 8]


async def test_an_end_that_only_repeats_is_still_an_end() -> None:
    one = ticket()
    one.put(event(5, 6))
    one.begin()
    one.put(event(5, 6, finish="stop"))
    events = await told(one.stream)
    assert [each.token_ids for each in events] == [(5, 6), ()]
    assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("other", [event(5, 9), event(5, finish="stop")])
async def test_a_second_run_that_differs_is_an_error(other: GenerationEvent) -> None:
    one = ticket()
    one.put(event(5, 6))
    one.begin()
    one.put(other)
    with pytest.raises(DivergedError):
        await told(one.stream)


async def test_holes_and_steps_are_not_told_twice() -> None:
    def view(step: int) -> GenerationEvent:
        return GenerationEvent((), STATS, view=StepView(step, (0,), (5,), (0.9,), 3))

    run = [
        view(1),
        replace(event(5), hole=0),
        replace(event(), hole=0, end_token_id=3),
        view(2),
        replace(event(5, 6), hole=1),
        replace(event(finish="length"), hole=1),
    ]
    for lost_after in range(len(run)):
        one = ticket()
        for each in run[:lost_after]:
            one.put(each)
        one.begin()
        for each in run:
            one.put(each)
        assert await told(one.stream) == run, lost_after


async def test_nothing_follows_the_end() -> None:
    one = ticket()
    one.put(event(5, finish="stop"))
    one.put(EngineError("late"))
    assert len(await told(one.stream)) == 1
    await asyncio.sleep(0)
    assert not one.stream._events


async def test_deadlines_travel_as_seconds() -> None:
    one = ticket(deadline=time.monotonic() + 100, priority=3)
    submit = one.begin()
    assert submit.request.deadline is None
    assert submit.request.priority == 3
    assert 99 < submit.seconds_left <= 100
    assert ticket(deadline=time.monotonic() - 1).begin().seconds_left == 0
    assert ticket().begin().seconds_left is None


async def test_work_shrinks_as_the_answer_grows() -> None:
    one = ticket()
    assert (one.tokens_left, one.work_left) == (8, 80)
    one.put(event(5, 6))
    assert (one.tokens_left, one.work_left) == (6, 60)


async def test_suspects_run_alone() -> None:
    one = ticket()
    one.losses = LOSSES_TO_ISOLATE - 1
    assert not one.must_run_alone
    one.losses += 1
    assert one.must_run_alone


def test_requests_and_events_can_be_sent() -> None:
    constrained = DecodingParams(constraints=Constraints(logit_bias=((1, 2.0),)))
    for each in (request(decoding=constrained), event(1, 2, finish="stop"), EngineError("x")):
        again = pickle.loads(pickle.dumps(each))
        assert again == each or str(again) == str(each)
