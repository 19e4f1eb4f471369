"""Rounds that do not end are noticed; rounds that take long are not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.tiny import GatedDecoder, request_of, running, tiny_decoder
from tests.waiting import wait_until
from vdiff_kserve.engine import EngineConfig, EngineStoppedError, watch
from vdiff_kserve.engine.watch import FIRST_SECONDS, LEAST_SECONDS, RoundTimes, RoundWatch


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)


def test_a_known_size_is_measured_by_its_slowest_recent_round() -> None:
    times = RoundTimes()
    for seconds in (0.2, 2.0, 0.3):
        times.add(1000, seconds)
    assert times.limit(600) == times.limit(1000) == 20
    for _ in range(watch.REMEMBERED_ROUNDS):
        times.add(900, 0.1)
    assert times.limit(1000) == LEAST_SECONDS


def test_a_new_size_is_given_time() -> None:
    times = RoundTimes()
    assert times.limit(2048) == FIRST_SECONDS
    times.add(5, 0.03)
    assert times.limit(2048) == pytest.approx(10 * 0.03 * 2**9)
    assert times.limit(16) == FIRST_SECONDS
    times.add(5, 9.0)  # the very first rounds say little about others
    assert times.limit(2048) == pytest.approx(10 * 0.03 * 2**9)


def test_only_looks_at_one_round_count() -> None:
    own = RoundWatch(threading.current_thread(), 1.0)
    for _ in range(3):
        own.begin()
        own.planned(8)
        for _ in range(5):  # the first sees the round, the others make 1.0 s
            own.look()
        assert not own.stuck
        own.end()
    own.begin()
    for _ in range(6):
        own.look()
    assert own.stuck
    own.end()
    own.look()
    assert not own.stuck


@pytest.mark.usefixtures("_quick")
def test_a_stalled_thread_is_noticed_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.2)
    told: list[str] = []
    for level in ("critical", "warning"):
        monkeypatch.setattr(watch.logger, level, lambda text, *values: told.append(text % values))
    decoder = GatedDecoder.around(tiny_decoder())
    with running(decoder) as engine, ThreadPoolExecutor() as pool:
        answer = pool.submit(engine.generate, [request_of(cache="none")])
        wait_until(lambda: decoder.waiting == 1)
        decoder.allow(3)
        wait_until(lambda: engine.stuck)
        assert engine.alive
        assert not engine.ready
        with pytest.raises(EngineStoppedError):
            engine.generate([request_of()])
        decoder.allow(1000)
        assert len(answer.result()[0].token_ids) == 16
        wait_until(lambda: engine.ready)
    stuck, over = told
    assert "the engine is stuck" in stuck
    assert "self.gate.acquire()" in stuck
    assert over == "The round that was stuck is over."


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("seconds", [None, 0])
def test_a_first_round_and_an_engine_without_a_limit_may_take_long(
    seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.01)
    decoder = GatedDecoder.around(tiny_decoder())
    with running(decoder, EngineConfig(round_timeout=seconds)) as engine:
        looked = threading.Event()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(engine.generate, [request_of()])
            wait_until(lambda: decoder.waiting == 1)
            looked.wait(0.3)  # many looks
            assert engine.ready
            decoder.allow(1000)
            answer.result()


@pytest.mark.usefixtures("_quick")
def test_a_stuck_engine_can_be_stopped() -> None:
    decoder = GatedDecoder.around(tiny_decoder())
    with running(decoder, EngineConfig(round_timeout=0.1)) as engine, ThreadPoolExecutor() as pool:
        answer = pool.submit(engine.generate, [request_of()])
        wait_until(lambda: engine.stuck)
        engine.stop()
        with pytest.raises(EngineStoppedError):
            answer.result()
        assert engine.alive  # its thread still waits for the pass
        decoder.allow(1000)
