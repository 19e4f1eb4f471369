"""The engines of the replicas' benchmark answer whole, at once or at a pace."""

from __future__ import annotations

import time

from benchmarks.replica_engines import CHUNK_SECONDS, instant_model, paced_model
from benchmarks.replicas import Overhead, Times, chunk_times, request_of, request_times
from vdiff_kserve import loading
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.engine import Engine


async def test_the_instant_engine_answers_in_one_event() -> None:
    engine = instant_model(ServerConfig()).engine
    (stream,) = engine.submit([request_of(1, 64)])
    (event,) = [event async for event in stream]
    assert len(event.token_ids) == 64
    assert event.finish_reason == "length"
    assert len((await request_times(engine, 3, "here")).all) == 3
    assert loading.Engine is Engine


async def test_the_paced_engine_stamps_a_chunk_at_a_time() -> None:
    engine = paced_model(ServerConfig()).engine
    started = time.monotonic()
    times, _ = await chunk_times(engine, streams=3, chunks=4)
    assert time.monotonic() - started >= 3 * CHUNK_SECONDS
    assert len(times.all) == 12
    assert min(times.all) >= 0


def test_overhead_is_the_difference() -> None:
    overhead = Overhead(Times([1.0, 2.0, 3.0]), Times([2.0, 4.0, 6.0]))
    assert overhead.added(50) == 2.0
    assert "p50 2.00 ms" in overhead.row("a request", 5.0)
