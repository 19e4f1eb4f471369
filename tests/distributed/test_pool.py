"""Who runs what, and what outlives a replica: the pool over replicas in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.local import Replicas, answers, replicas, tokens_of
from tests.distributed.test_channel import let_ray_encrypt, write_authority
from tests.engine.tiny import GatedDecoder, generate, request_of, tiny_decoder, tiny_spec
from vdiff_kserve.distributed import autoscale, replica, supervisor, ticket
from vdiff_kserve.distributed.autoscale import Autoscaler, Bounds
from vdiff_kserve.distributed.link import State
from vdiff_kserve.distributed.messages import Batch
from vdiff_kserve.engine import (
    Engine,
    EngineError,
    EngineStoppedError,
    EventSink,
    GenerationRequest,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    block_hashes,
    watch,
)
from vdiff_kserve.models import Decoder

POISON = (9, 9, 9)
Sinks = Sequence[EventSink]
Aborts = list[Callable[[], None]]


def many(count: int) -> list[GenerationRequest]:
    return [
        request_of((1, 2, i % 30), 16, temperature=0.8 if i % 2 else 0.0, seed=i)
        for i in range(count)
    ]


def expected(requests: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in generate(tiny_decoder(), *requests)]


class Gated:
    """Decoders that wait before every pass, one for each replica, in the order of their start."""

    def __init__(self) -> None:
        self.decoders: list[GatedDecoder] = []

    def __call__(self) -> GatedDecoder:
        self.decoders.append(GatedDecoder.around(tiny_decoder()))
        return self.decoders[-1]

    def open(self) -> None:
        """Hold nobody back any more."""
        for decoder in self.decoders:
            decoder.allow(100_000)


async def test_replicas_answer_as_one_engine(monkeypatch) -> None:
    requests = many(40)
    async with replicas(monkeypatch, "3") as three:
        assert await answers(three.pool, *requests) == expected(requests)
        assert three.pool.num_waiting == 0
        assert three.pool.outstanding_tokens == 0


async def test_replicas_answer_over_encrypted_connections(monkeypatch, tmp_path: Path) -> None:
    write_authority(tmp_path, "ours")
    let_ray_encrypt(monkeypatch, tmp_path, "ours", "ours")
    requests = many(8)
    async with replicas(monkeypatch) as two:
        (cipher, *_) = {
            link._channel._transport.get_extra_info("cipher") for link in two.pool.links
        }
        assert cipher is not None
        assert await answers(two.pool, *requests) == expected(requests)


async def test_work_is_spread(monkeypatch) -> None:
    gates = Gated()
    async with replicas(monkeypatch, "3", decoder=gates) as three:
        streams = three.pool.submit(many(6))
        assert [len(link.tickets) for link in three.pool.links] == [2, 2, 2]
        (long,) = three.pool.submit([request_of(max_tokens=64)])
        three.pool.submit(many(4))
        held = sorted(len(link.tickets) for link in three.pool.links)
        assert held == [3, 4, 4]
        gates.open()
        await asyncio.gather(*(tokens_of(stream) for stream in [*streams, long]))


async def test_a_death_in_the_middle_changes_no_answer(monkeypatch) -> None:
    requests = many(12)
    gates = Gated()
    async with replicas(monkeypatch, decoder=gates) as two:
        streams = two.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        for decoder in gates.decoders:
            decoder.allow(5)
        held = [list(link.tickets.values()) for link in two.pool.links]
        await two.until(lambda: any(t.delivered for tickets in held for t in tickets))
        two.actors[0].die()
        await two.until(lambda: len(gates.decoders) == 3)
        gates.open()
        assert await asyncio.gather(*reading) == expected(requests)
        assert len(two.actors) == 3


async def test_it_is_ready_while_one_replica_is(monkeypatch) -> None:
    may_load = threading.Event()
    may_load.set()

    def decoder() -> Decoder:
        may_load.wait(30)
        return tiny_decoder()

    async with replicas(monkeypatch, decoder=decoder) as two:
        may_load.clear()
        two.actors[0].die()
        await two.until(lambda: len(two.actors) == 3)
        assert two.pool.ready
        two.actors[1].die()
        await two.until(lambda: len(two.actors) == 4)
        assert not two.pool.ready
        may_load.set()
        await two.until(lambda: two.pool.ready)


async def test_a_replica_that_is_silent_is_replaced(monkeypatch) -> None:
    requests = many(6)
    async with replicas(monkeypatch) as two:
        two.actors[1].freeze()
        assert await answers(two.pool, *requests) == expected(requests)
        assert two.actors[1].is_dead
        assert len(two.living) == 2


async def test_a_connection_that_breaks_is_a_loss_to_both_ends(monkeypatch) -> None:
    requests = many(8)
    gates = Gated()
    async with replicas(monkeypatch, decoder=gates) as two:
        streams = two.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        cut_off = two.actors[0]._replica
        await two.until(lambda: len(cut_off._running) == 4 and gates.decoders[0].waiting == 1)
        cut_off._channel._transport.abort()
        await two.until(lambda: two.actors[0].is_dead and not cut_off._running)
        await two.until(lambda: len(gates.decoders) == 3)
        gates.open()
        assert await asyncio.gather(*reading) == expected(requests)


async def test_a_front_end_that_is_slow_gets_fewer_and_larger_batches(monkeypatch) -> None:
    batches: list[int] = []
    gates = Gated()
    requests = many(4)
    async with replicas(monkeypatch, "1", decoder=gates) as one:
        (link,) = one.pool.links
        hear = link._channel._receive

        def count(batch: Batch) -> None:
            batches.append(len(batch.events))
            hear(batch)

        monkeypatch.setattr(link._channel, "_receive", count)
        streams = one.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        told = one.actors[0]._replica._channel
        await one.until(lambda: gates.decoders[0].waiting == 1)
        told.pause_writing()  # as when the system takes no more
        gates.open()
        engine = one.actors[0]._replica._engine
        await one.until(lambda: engine.num_running == 0)
        await asyncio.sleep(0)
        assert sum(batches) == 0
        told.resume_writing()
        assert await asyncio.gather(*reading) == expected(requests)
    assert len([size for size in batches if size]) == 1


async def test_an_engine_that_is_stuck_in_a_round_is_replaced(monkeypatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(replica, "HEARTBEAT_SECONDS", 0.1)
    requests = many(12)
    gates = Gated()
    async with replicas(monkeypatch, decoder=gates) as two:
        streams = two.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        stuck, well = (actor._replica._engine._runner._decoder for actor in two.actors)
        stuck.allow(5)
        well.allow(100_000)
        await two.until(lambda: len(gates.decoders) == 3)
        assert two.actors[0].is_dead
        assert not two.actors[1].is_dead
        gates.open()
        assert await asyncio.gather(*reading) == expected(requests)


def test_silence_and_stalls_are_noticed_within_five_seconds() -> None:
    silence = supervisor.SILENT_LOOKS * supervisor.LOOK_SECONDS + supervisor.LOOK_SECONDS
    stall = watch.LEAST_SECONDS + 2 * watch.LOOK_SECONDS + replica.HEARTBEAT_SECONDS
    assert max(silence, stall) <= 5


async def test_an_engine_whose_loop_dies_is_replaced(monkeypatch) -> None:
    requests = many(8)
    async with replicas(monkeypatch) as two:
        streams = two.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        two.actors[0]._replica._engine.stop()
        assert await asyncio.gather(*reading) == expected(requests)


class PoisonedEngine(Engine):
    """Dies of one prompt."""

    def post(self, requests: Sequence[GenerationRequest], sinks: Sinks) -> Aborts:
        if any(request.prompt_ids == POISON for request in requests):
            self.stop()
            raise EngineStoppedError("poisoned")
        return super().post(requests, sinks)


async def test_a_poison_request_is_refused_and_named_and_the_others_live(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = replace(request_of(POISON), request_id="the-poison")
    requests = many(20)
    async with replicas(monkeypatch, engine_class=PoisonedEngine) as two:
        streams = two.pool.submit([*requests[:10], poison, *requests[10:]])
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        done = await asyncio.gather(*reading, return_exceptions=True)
        failure = done.pop(10)
        assert type(failure) is EngineError
        assert done == expected(requests)
        assert len(two.actors) == 2 + ticket.MAX_LOSSES
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "the-poison" in each]
    assert "ERROR" in line
    assert "given up" in line


async def test_priorities_hold_across_replicas(monkeypatch) -> None:
    gates = Gated()
    given: list[int] = []

    class Recording(Engine):
        def post(self, requests: Sequence[GenerationRequest], sinks: Sinks) -> Aborts:
            given.extend(request.priority for request in requests)
            return super().post(requests, sinks)

    async with replicas(monkeypatch, decoder=gates, max_num_seqs=1, engine_class=Recording) as two:
        late = [replace(request_of(max_tokens=8), priority=p) for p in (0, 0, 0, 0, 5, 3, 1)]
        streams = two.pool.submit(late)
        assert [len(link.tickets) for link in two.pool.links] == [2, 2]
        gates.open()
        await asyncio.gather(*(tokens_of(stream) for stream in streams))
    assert given == [0, 0, 0, 0, 1, 3, 5]


async def test_requests_give_up_in_the_queue_and_on_the_replica(monkeypatch) -> None:
    gates = Gated()
    async with replicas(monkeypatch, "1", decoder=gates, max_num_seqs=1) as one:
        soon = time.monotonic() + 0.5
        streams = one.pool.submit([replace(request_of(), deadline=soon) for _ in range(4)])
        await one.until(lambda: time.monotonic() > soon)
        gates.open()
        ends = await asyncio.gather(*(tokens_of(s) for s in streams), return_exceptions=True)
    assert isinstance(ends[0], RequestTimeoutError)
    assert all(isinstance(end, QueueTimeoutError) for end in ends[1:])


async def test_the_queue_is_bounded(monkeypatch) -> None:
    gates = Gated()
    async with replicas(monkeypatch, decoder=gates, max_num_seqs=2, max_queue=3) as two:
        streams = two.pool.submit(many(7))
        with pytest.raises(QueueFullError, match="4 running and 3 waiting"):
            two.pool.submit(many(1))
        streams[0].abort()
        await two.until(lambda: two.pool.outstanding_tokens == 6 * 16)
        two.pool.submit(many(1))
        gates.open()


async def test_a_client_that_leaves_frees_its_place_before_the_next_pass(monkeypatch) -> None:
    gates = Gated()
    async with replicas(monkeypatch, "1", decoder=gates) as one:
        left, stays = one.pool.submit([request_of((1,)), request_of((2,))])
        (decoder,) = gates.decoders
        await one.until(lambda: decoder.waiting == 1)
        left.abort()
        engine = one.actors[0]._replica._engine
        await one.until(lambda: not one.actors[0]._replica._running.get(0))
        decoder.allow(1)
        await one.until(lambda: decoder.passes == 1 and decoder.waiting == 1)
        assert engine.num_running == 1
        gates.open()
        assert len(await tokens_of(stays)) == 16


async def test_prompts_that_begin_alike_go_where_the_beginning_is_known(monkeypatch) -> None:
    decoder = tiny_decoder(attention_block=4)
    spec = replace(tiny_spec(decoder), block_length=4)

    def request(first: int) -> GenerationRequest:
        return request_of((first,) * 16 + (3,), 4, block_length=4, cache="exact")

    async with replicas(monkeypatch, decoder=lambda: decoder, spec=spec) as two:
        for first in (1, 2, 1, 2, 1, 2, 2, 2):
            await answers(two.pool, request(first))
        engines = [actor._replica._engine for actor in two.actors]
        links = two.pool.links
        hashes = [block_hashes((first,) * 16, 4) for first in (1, 2)]
        known = [[link.prefixes.blocks_known(each) for link in links] for each in hashes]
        assert all(sorted(each) == [0, 4] for each in known)
        assert all(engine.num_steps > 0 for engine in engines)


async def test_a_load_brings_replicas_and_their_absence_takes_them(monkeypatch) -> None:
    monkeypatch.setattr(autoscale, "UP_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(autoscale, "DOWN_AFTER_SECONDS", 0.2)
    gates = Gated()
    scaler = Autoscaler(Bounds(1, 3), tokens_per_replica=64)
    async with replicas(monkeypatch, "1:3", decoder=gates, autoscaler=scaler) as few:
        requests = many(20)
        streams = few.pool.submit(requests)
        reading = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        await few.until(lambda: sum(len(link.tickets) > 0 for link in few.pool.links) == 3)
        gates.open()
        assert await asyncio.gather(*reading) == expected(requests)
        await few.until(lambda: len(few.living) == 1)


@pytest.mark.parametrize("number", ["1", "3"])
async def test_a_restart_replaces_all_and_fails_nothing(monkeypatch, number: str) -> None:
    requests = many(60)
    async with replicas(monkeypatch, number) as some:
        old = list(some.actors)
        some.supervisor.restart()
        reading = []
        for request in requests:
            assert some.pool.ready
            (stream,) = some.pool.submit([request])
            reading.append(asyncio.create_task(tokens_of(stream)))
            await asyncio.sleep(0.005)
        assert await asyncio.gather(*reading) == expected(requests)
        await some.until(lambda: all(actor.is_dead for actor in old))
        await some.until(lambda: _ready(some) == int(number))
        assert len(some.actors) == 2 * int(number)


def _ready(some: Replicas) -> int:
    return sum(link.state is State.READY for link in some.pool.links)


async def test_a_stopped_pool_tells_its_requests_where_its_batches_come(monkeypatch) -> None:
    gates, threads, fail = Gated(), set[threading.Thread](), ticket.Ticket.fail

    def noted(each: ticket.Ticket, error: EngineError) -> None:
        threads.add(threading.current_thread())
        fail(each, error)

    monkeypatch.setattr(ticket.Ticket, "fail", noted)
    async with replicas(monkeypatch, decoder=gates) as two:
        streams = two.pool.submit(many(12))
        await asyncio.to_thread(two.pool.stop)
        assert threads == {threading.current_thread()}
        ends = await asyncio.gather(*(tokens_of(s) for s in streams), return_exceptions=True)
        assert all(isinstance(end, EngineStoppedError) for end in ends)
        assert not two.pool.alive
        with pytest.raises(EngineStoppedError):
            two.pool.submit(many(1))
    gates.open()


class NoActorsError(Exception):
    """Of a cluster that starts nothing."""


def start_no_actor(*_: object) -> None:
    raise NoActorsError


async def test_a_supervisor_that_fails_takes_the_pool_with_it(monkeypatch) -> None:
    """A server that replaces no replicas must not be taken for healthy."""
    gates = Gated()
    async with replicas(monkeypatch, "1", decoder=gates) as one:
        (stream,) = one.pool.submit(many(1))
        monkeypatch.setattr(one.supervisor._resources, "start", start_no_actor)
        one.actors[0].die()
        with pytest.raises(EngineStoppedError):
            await tokens_of(stream)
        assert not one.pool.alive
    gates.open()


async def test_a_supervisor_that_fails_at_once_says_why(monkeypatch) -> None:
    monkeypatch.setattr(supervisor.Supervisor, "_start_one", start_no_actor)
    with pytest.raises(NoActorsError):
        async with replicas(monkeypatch, "1"):
            pass
