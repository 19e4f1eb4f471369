"""The engine's face: queueing, aborting, failing, stopping, streaming; and that nothing leaks."""

import asyncio
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.device import needs_cpu_library
from tests.engine.tiny import (
    GatedDecoder,
    WatchingEngine,
    generate,
    request_of,
    running,
    tiny_auxiliary,
    tiny_decoder,
    tiny_spec,
)
from tests.waiting import wait_until
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    EngineError,
    EngineStoppedError,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    GenerationStream,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.engine.row import Decision
from vdiff_kserve.models import Decoder, ForwardBatch, load_decoder
from vdiff_kserve.sampler import Policy

DECODER = tiny_decoder()
POISON = 36
"""A token id that `PoisonedDecoder` fails on when it stands in a prompt."""

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")


class PoisonedDecoder(Decoder):
    """Fails on every batch that holds a certain token."""

    @classmethod
    def around(
        cls, decoder: Decoder, error: type[BaseException] = RuntimeError
    ) -> "PoisonedDecoder":
        poisoned = cls(decoder.config)
        poisoned.load_state_dict(decoder.state_dict())
        poisoned.error = error
        return poisoned.requires_grad_(False).eval()

    def forward(self, batch: ForwardBatch) -> Tensor:
        if (batch.input_ids == POISON).any():
            raise self.error("poison in the batch")
        return super().forward(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        logits[:, POISON] = -1e9
        return logits


def poisoned_request(**decoding: object) -> GenerationRequest:
    return request_of(prompt=(POISON,), **decoding)


async def collect(stream: GenerationStream) -> list[GenerationEvent]:
    return [event async for event in stream]


def tokens_of(events: Sequence[GenerationEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def assert_empty(engine: Engine) -> None:
    """Nothing waits, runs or holds cache."""
    wait_until(lambda: engine.num_running == engine.num_waiting == 0)
    for cache in (engine._cache, engine._auxiliary_cache):
        if cache is not None:
            wait_until(lambda cache=cache: cache.used == 0)
            assert cache.reserve(cache.capacity) == 0, "the cache is not in one piece"
            cache.release(0)


async def test_stream_gives_events_in_order_and_ends() -> None:
    with running(DECODER) as engine:
        (stream,) = engine.submit([request_of(max_tokens=24)])
        events = await collect(stream)
    expected = generate(DECODER, request_of(max_tokens=24))[0]
    assert tokens_of(events) == expected.token_ids
    assert events[-1].finish_reason == "length"
    assert all(event.finish_reason is None for event in events[:-1])
    assert [event.stats.nfe for event in events] == sorted({event.stats.nfe for event in events})
    assert len(events) > 1


async def test_every_stream_of_a_submission_gets_its_own_answer() -> None:
    requests = [request_of(prompt=(i, i + 1), max_tokens=8 + i) for i in range(5)]
    with running(DECODER) as engine:
        streams = engine.submit(requests)
        answers = [tokens_of(events) for events in await asyncio.gather(*map(collect, streams))]
    assert answers == [generate(DECODER, request)[0].token_ids for request in requests]


async def test_abort_frees_a_running_row_before_the_next_pass() -> None:
    """A half-done block's slot and cache are free, and no further pass is spent on it."""
    gated = GatedDecoder.around(DECODER)
    with running(gated) as engine:
        (stream,) = engine.submit([request_of(max_tokens=24, cache="dual", cfg_scale=1.0)])
        gated.allow(3)
        wait_until(lambda: gated.passes == 3 and gated.waiting == 1)
        assert (engine.num_running, engine._cache.used) == (1, 2 * 27)
        row = engine.watched[0].row
        assert row.masked[row.block_start : row.block_end].any()
        stream.abort()
        stream.abort()
        gated.allow(1)
        assert_empty(engine)
        assert gated.passes == 4


async def test_abort_of_a_waiting_row_gives_its_place_in_the_queue() -> None:
    gated = GatedDecoder.around(DECODER)
    with running(gated, EngineConfig(max_num_seqs=1, max_queue=1)) as engine:
        (first,) = engine.submit([request_of()])
        wait_until(lambda: gated.waiting == 1)
        (second,) = engine.submit([request_of()])
        with pytest.raises(QueueFullError):
            engine.submit([request_of()])
        second.abort()
        (third,) = engine.submit([request_of()])
        gated.allow(1)
        wait_until(lambda: gated.waiting == 1 and gated.passes == 1)
        assert engine.num_waiting == 1
        gated.allow(31)
        assert tokens_of(await collect(first)) == tokens_of(await collect(third))
        assert_empty(engine)
        assert gated.passes == 32


async def test_abort_of_a_running_row_gives_its_place_before_its_pass_ends() -> None:
    """Else whoever ends an answer at a stop string would be refused the next one."""
    gated = GatedDecoder.around(DECODER)
    with running(gated, EngineConfig(max_num_seqs=1, max_queue=0)) as engine:
        (first,) = engine.submit([request_of()])
        wait_until(lambda: gated.waiting == 1)
        first.abort()
        (second,) = engine.submit([request_of()])
        gated.allow(17)
        assert len(tokens_of(await collect(second))) == 16
        assert_empty(engine)


async def test_abort_in_the_middle_of_a_stream_leaves_the_others_alone() -> None:
    kept = request_of(prompt=(4, 5), max_tokens=32)
    with running(DECODER) as engine:
        left, stays = engine.submit([request_of(max_tokens=32), kept])
        async for _ in left:
            left.abort()
            break
        events = await collect(stays)
        left.abort()
        assert_empty(engine)
    assert tokens_of(events) == generate(DECODER, kept)[0].token_ids


async def test_abort_after_the_end_does_nothing() -> None:
    with running(DECODER) as engine:
        (stream,) = engine.submit([request_of()])
        await collect(stream)
        stream.abort()
        assert_empty(engine)
        assert engine.generate([request_of()])[0].finish_reason == "length"


async def test_full_queue_takes_all_of_a_submission_or_none() -> None:
    gated = GatedDecoder.around(DECODER)
    with running(gated, EngineConfig(max_num_seqs=2, max_queue=3)) as engine:
        engine.submit([request_of()])
        wait_until(lambda: gated.waiting == 1)
        with pytest.raises(QueueFullError, match=r"2 running and 3 waiting"):
            engine.submit([request_of()] * 5)
        assert engine.num_waiting == 0
        streams = engine.submit([request_of()] * 4)
        with pytest.raises(QueueFullError):
            engine.submit([request_of()])
        gated.allow(1000)
        answers = await asyncio.gather(*map(collect, streams))
        assert len(answers) == 4
        assert_empty(engine)


def test_cache_that_is_lent_out_makes_rows_wait() -> None:
    """Rows that do not fit in the cache together run one after the other, first come first."""
    requests = [request_of(prompt=(i,), max_tokens=15, cache="prefix") for i in range(4)]
    with running(DECODER, EngineConfig(kv_cache_tokens=20)) as engine:
        results = engine.generate(requests)
        assert_empty(engine)
    assert results == generate(DECODER, *requests)


def test_request_larger_than_the_cache_is_refused_at_once() -> None:
    auxiliary = tiny_auxiliary()
    too_large = [
        request_of(max_tokens=20, cache="dual"),
        request_of(max_tokens=10, cache="dual", cfg_scale=1.0),
        request_of(max_tokens=20, policy="apd"),
        request_of(max_tokens=20, policy="apd", apd_window=None),
    ]
    with running(DECODER, EngineConfig(kv_cache_tokens=20), auxiliary=auxiliary) as engine:
        for request in too_large:
            with pytest.raises(EngineError, match="the server has 20"):
                engine.generate([request_of(), request])
            assert_empty(engine)
        assert engine.generate([request_of(max_tokens=20)])[0].finish_reason == "length"


def test_engine_that_was_not_started_refuses_requests() -> None:
    engine = Engine(DECODER, tiny_spec(DECODER), EngineConfig())
    assert not engine.alive
    with pytest.raises(EngineStoppedError):
        engine.generate([request_of()])


async def test_stop_ends_running_and_waiting_requests() -> None:
    gated = GatedDecoder.around(DECODER)
    with running(gated, EngineConfig(max_num_seqs=1)) as engine:
        streams = engine.submit([request_of(cache="dual"), request_of()])
        wait_until(lambda: gated.waiting == 1)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        wait_until(lambda: engine.num_running == 0)
        gated.allow(1)
        stopper.join()
        for stream in streams:
            with pytest.raises(EngineStoppedError):
                await collect(stream)
        assert not engine.alive
        assert engine.failure is None
        assert gated.passes == 1
        assert_empty(engine)
        with pytest.raises(EngineStoppedError):
            engine.submit([request_of()])


async def test_stop_of_an_idle_engine_returns() -> None:
    with running(DECODER) as engine:
        engine.stop()
        assert not engine.alive
    engine.stop()


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
async def test_failing_forward_fails_only_its_culprit(error: type[BaseException]) -> None:
    healthy = [
        request_of(prompt=(i, 2), max_tokens=12 + i, cache=cache, temperature=0.5, seed=i)
        for i, cache in enumerate(["none", "dual", "prefix", "none", "dual"])
    ]
    poisoned = PoisonedDecoder.around(DECODER, error)
    expected = generate(poisoned, *healthy)
    with running(poisoned) as engine:
        streams = engine.submit([*healthy[:2], poisoned_request(cache="dual"), *healthy[2:]])
        culprit = streams.pop(2)
        with pytest.raises(EngineError, match="failed on this request"):
            await collect(culprit)
        answers = await asyncio.gather(*map(collect, streams))
        assert_empty(engine)
        assert engine.alive
    assert [tokens_of(events) for events in answers] == [result.token_ids for result in expected]
    assert [events[-1].stats for events in answers] == [result.stats for result in expected]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_engine_of_a_lost_gpu_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later request would fail, with a server that looks well."""

    def raise_lost(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", raise_lost)
    with running(PoisonedDecoder.around(DECODER)) as engine:
        with pytest.raises(EngineError, match="failed on this request"):
            engine.generate([poisoned_request()])
        monkeypatch.setattr(engine, "_device", torch.device("cuda", 0))
        with pytest.raises(EngineStoppedError):
            engine.generate([poisoned_request()])
        wait_until(lambda: not engine.alive)
        assert "illegal" in str(engine.failure)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_engine_whose_thread_cannot_take_its_gpu_tells_its_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.device) -> None:
        raise RuntimeError("CUDA error: no such device")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    engine = Engine(DECODER, tiny_spec(DECODER), EngineConfig())
    monkeypatch.setattr(engine, "_device", torch.device("cuda", 0))
    engine.start()
    with pytest.raises(EngineStoppedError):
        engine.generate([poisoned_request()])
    assert "no such device" in str(engine.failure)


def test_memory_of_a_failed_attempt_is_free_before_the_next() -> None:
    """What a forward pass held when memory ran out must not stand in the way of half the rows."""

    class Narrow(Decoder):
        def forward(self, batch: ForwardBatch) -> Tensor:
            held_meanwhile = [each() for each in held if each() is not None]
            if len(batch.spans) > 1:
                activations = torch.zeros(1000)
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("no memory for so many rows")
            assert not held_meanwhile, "the failed attempt still holds its tensors"
            return super().forward(batch)

    held: list[weakref.ref[Tensor]] = []
    narrow = Narrow(DECODER.config).requires_grad_(False).eval()
    narrow.load_state_dict(DECODER.state_dict())
    requests = [request_of(prompt=(i,), max_tokens=4) for i in range(4)]
    assert generate(narrow, *requests) == generate(DECODER, *requests)
    assert held, "no attempt failed"


def test_many_culprits_fail_alone() -> None:
    poisoned = PoisonedDecoder.around(DECODER)
    requests = [poisoned_request() if i % 3 == 0 else request_of(prompt=(i,)) for i in range(8)]
    outcomes: list[GenerationResult | EngineError | None] = [None] * len(requests)
    with running(poisoned) as engine:

        def ask(i: int) -> None:
            try:
                (outcomes[i],) = engine.generate([requests[i]])
            except EngineError as failure:
                outcomes[i] = failure

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert_empty(engine)
    for request, outcome in zip(requests, outcomes, strict=True):
        if request.prompt_ids == (POISON,):
            assert isinstance(outcome, EngineError)
        else:
            assert outcome == generate(poisoned, request)[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_death_of_the_loop_is_seen_and_told() -> None:
    class Fatal(BaseException):
        pass

    gated = GatedDecoder.around(DECODER)
    with running(gated, EngineConfig(max_num_seqs=2)) as engine:
        streams = engine.submit([request_of(cache="prefix"), request_of(), request_of()])
        wait_until(lambda: gated.waiting == 1)

        def die(decision: Decision) -> None:
            raise Fatal

        engine.watched[1].row.apply = die  # type: ignore[method-assign]
        gated.allow(1)
        for stream in streams:
            with pytest.raises(EngineStoppedError):
                await collect(stream)
        wait_until(lambda: not engine.alive)
        assert isinstance(engine.failure, Fatal)
        assert_empty(engine)
        with pytest.raises(EngineStoppedError):
            engine.generate([request_of()])


async def test_abandoned_loop_does_not_kill_the_engine() -> None:
    """A client's asyncio loop that closed before its answer was done."""
    gated = GatedDecoder.around(DECODER)
    with running(gated) as engine:

        async def submit() -> None:
            engine.submit([request_of()])

        await asyncio.to_thread(asyncio.run, submit())
        gated.allow(1000)
        assert_empty(engine)
        assert engine.alive


POLICIES: tuple[Policy, ...] = get_args(Policy)


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Every policy and cache, many lengths, temperatures and seeds."""
    choose = random.Random(5)
    requests = []
    for i in range(count):
        request = request_of(
            prompt=tuple(choose.randrange(36) for _ in range(choose.randint(1, 9))),
            max_tokens=choose.randint(1, 24),
            block_length=choose.choice([3, 8, 16]),
            policy=POLICIES[i % len(POLICIES)],
            cache=["none", "prefix", "dual"][i // len(POLICIES) % 3],
            temperature=choose.choice([0.0, 0.8]),
            top_p=choose.choice([1.0, 0.9]),
            top_k=choose.choice([0, 10]),
            cfg_scale=choose.choice([0.0, 0.0, 1.5]),
            steps=choose.choice([None, 6]),
            threshold=choose.choice([0.5, 0.8]),
            edit_threshold=0.6,
            vicinity=choose.choice([0, 2]),
            refresh_interval=choose.choice([None, 2]),
            max_lookahead=choose.choice([None, 4]),
            apd_window=choose.choice([None, 4]),
            alg_temp=choose.choice([0.0, 0.3]),
            seed=i,
        )
        requests.append(replace(request, end_token_ids=choose.choice([(), (7, 11, 19)])))
    return requests


@pytest.mark.parametrize("with_auxiliary", [False, True])
async def test_result_is_the_same_alone_together_and_staggered(with_auxiliary: bool) -> None:
    """In float64, so that rounding, which depends on the batch's shape, decides nothing."""
    decoder = tiny_decoder().double()
    auxiliary = tiny_auxiliary().double() if with_auxiliary else None
    requests = mixed_requests(64 if not with_auxiliary else 24)
    if with_auxiliary:
        requests = [
            replace(r, decoding=replace(r.decoding, policy="apd")) if i % 2 else r
            for i, r in enumerate(requests)
        ]

    def engine_of(slots: int) -> WatchingEngine:
        engine = WatchingEngine(
            decoder, tiny_spec(decoder), EngineConfig(max_num_seqs=slots), auxiliary
        )
        engine.start()
        return engine

    one = engine_of(1)
    alone = [one.generate([request])[0] for request in requests]
    one.stop()
    crowd = engine_of(64)
    assert crowd.generate(requests) == alone
    assert crowd.generate(requests[::-1]) == alone[::-1]
    crowd.stop()
    few = engine_of(7)
    streams: list[GenerationStream] = []
    for i, request in enumerate(requests):
        streams += few.submit([request])
        if i % 5 == 4:
            await anext(aiter(streams[-1]))
    wait_until(lambda: few.num_running == few.num_waiting == 0)
    few.stop()
    staggered = [tuple(watched.row.canvas.tolist()) for watched in few.watched]
    assert staggered == [tuple(watched.row.canvas.tolist()) for watched in one.watched]
    assert [watched.row.stats for watched in few.watched] == [result.stats for result in alone]


@needs_cpu_library
def test_kernels_for_cpus_make_bfloat16_the_same_in_any_batch() -> None:
    """To the bit, with the embedded model."""
    decoder, spec = load_decoder(EMBEDDED, "cpu", torch.bfloat16)
    requests = mixed_requests(64)
    answers = []
    for slots, order in ((1, 1), (64, 1), (7, -1)):
        with running(decoder, EngineConfig(max_num_seqs=slots), spec=spec) as engine:
            answers.append(engine.generate(requests[::order])[::order])
    alone, crowd, few = answers
    assert crowd == alone
    assert few == alone


async def churn(rounds: int, block_causal: bool = False) -> None:
    """Random submits, aborts, failures and deadlines from a seed; at the end nothing is left."""
    choose = random.Random(11)
    decoder = tiny_decoder(attention_block=8) if block_causal else DECODER
    poisoned = PoisonedDecoder.around(decoder)
    config = EngineConfig(
        max_num_seqs=6, max_queue=12, kv_cache_tokens=150, max_num_batched_tokens=40
    )
    auxiliary = None if block_causal else tiny_auxiliary()
    with running(poisoned, config, auxiliary=auxiliary, spec=tiny_spec(decoder)) as engine:
        refused = aborted = 0
        reading: list[asyncio.Task[list[GenerationEvent]]] = []
        caches = ["none", "exact"] if block_causal else ["none", "prefix", "dual"]
        policies = ["threshold", "edit", "entropy_bound", "credit"]
        policies += [] if block_causal else ["apd"]
        for _ in range(rounds):
            request = request_of(
                prompt=(choose.choice([1, 2, 3, 4, POISON]),) * choose.randint(1, 5),
                max_tokens=choose.randint(1, 20),
                policy=choose.choice(policies),
                cache=choose.choice(caches),
                cfg_scale=choose.choice([0.0, 0.0, 1.0]),
                threshold=0.5,
            )
            if choose.random() < 0.2:
                deadline = time.monotonic() + 0.02 * choose.random()
                request = replace(request, deadline=deadline)
            try:
                streams = engine.submit([request] * choose.randint(1, 3))
            except QueueFullError:
                refused += 1
                unread = [task for task in reading if not task.done()]
                if unread:
                    await asyncio.wait(unread, return_when=asyncio.FIRST_COMPLETED)
                continue
            for stream in streams:
                if choose.random() < 0.3:
                    if choose.random() < 0.5:
                        await asyncio.wait(
                            [asyncio.ensure_future(anext(aiter(stream)))], timeout=0.01
                        )
                    stream.abort()
                    aborted += 1
                else:
                    reading.append(asyncio.ensure_future(collect(stream)))
        ends = Counter(map(type, await asyncio.gather(*reading, return_exceptions=True)))
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)
        if engine._prefixes is not None:
            engine._prefixes.clear()
        assert_empty(engine)
        assert engine.alive
        late = ends[QueueTimeoutError] + ends[RequestTimeoutError]
        assert min(ends[list], ends[EngineError], aborted, late) > 0
        assert ends[list] + ends[EngineError] + late == len(reading)
        assert not engine._scheduler._running
        assert not engine._scheduler._waiting


@pytest.mark.parametrize("block_causal", [False, True])
async def test_nothing_is_left_after_many_submits_aborts_failures_and_deadlines(
    block_causal: bool,
) -> None:
    await churn(150, block_causal)


@pytest.mark.slow
@pytest.mark.parametrize("block_causal", [False, True])
async def test_nothing_is_left_after_a_thousand_of_them(block_causal: bool) -> None:
    await churn(1000, block_causal)


async def test_requests_from_many_threads_get_their_own_answers() -> None:
    requests = [request_of(prompt=(i,), max_tokens=6) for i in range(16)]
    with running(DECODER) as engine:
        answers = await asyncio.gather(
            *(asyncio.to_thread(engine.generate, [request]) for request in requests)
        )
        assert_empty(engine)
    assert [result for (result,) in answers] == generate(DECODER, *requests)
