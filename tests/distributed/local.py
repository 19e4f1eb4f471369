"""Replicas in this process: all of the real code but Ray, and failures at the moment one wants.

A `LocalActor` runs a real `Replica` on the test's own loop and answers like a Ray actor's handle.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from tests.engine.tiny import tiny_decoder, tiny_spec
from tests.openai.engine import limits
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed import supervisor as supervising
from vdiff_kserve.distributed.autoscale import Autoscaler, Bounds
from vdiff_kserve.distributed.link import State
from vdiff_kserve.distributed.meeting import Listener
from vdiff_kserve.distributed.pool import ReplicaPool
from vdiff_kserve.distributed.replica import Loader, Replica
from vdiff_kserve.distributed.supervisor import Supervisor
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    GenerationEvent,
    GenerationRequest,
    GenerationStream,
    RoundObserver,
)
from vdiff_kserve.models import Decoder, ModelSpec
from vdiff_kserve.openai.limits import ServingLimits


class LocalActor:
    """Stands where a Ray actor's handle stands."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._dead = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._replica, name)

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Coroutine[Any, Any, Any]:
                return self._call(method(*arguments))

        return Method

    @property
    def is_dead(self) -> bool:
        return self._dead.is_set()

    def die(self) -> None:
        """What SIGKILL does: its connection breaks, its open calls fail, and all later ones."""
        self._dead.set()
        self._replica._channel.close()
        if (engine := self._replica._engine) is not None:
            # A pass may wait for its test; a killed process waits for nothing.
            threading.Thread(target=engine.stop, daemon=True).start()

    def freeze(self) -> None:
        """What SIGSTOP does: nothing of it is sent any more."""
        self._replica._channel.is_writable = False

    async def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        answering = asyncio.create_task(work)
        dying = asyncio.create_task(self._dead.wait())
        try:
            await asyncio.wait([answering, dying], return_when=asyncio.FIRST_COMPLETED)
            if self._dead.is_set():
                raise ray.exceptions.ActorDiedError
            return answering.result()
        finally:
            answering.cancel()
            dying.cancel()


@dataclass
class LocalModel:
    """What a loader makes."""

    engine: Engine
    spec: ModelSpec
    limits: ServingLimits = field(default_factory=limits)
    dtype: str = "float32"
    device: str = "cpu"

    def warm_up(self) -> None:
        """Nothing: tests count passes."""


@dataclass
class Replicas:
    """A pool with its replicas.

    Attributes:
        actors: all that were ever started.
    """

    pool: ReplicaPool
    supervisor: Supervisor
    actors: list[LocalActor]

    @property
    def living(self) -> list[LocalActor]:
        return [actor for actor in self.actors if not actor.is_dead]

    async def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for something that comes true without being awaited."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)


@asynccontextmanager
async def replicas(
    monkeypatch: pytest.MonkeyPatch,
    number: str = "2",
    *,
    decoder: Callable[[], Decoder] = tiny_decoder,
    spec: ModelSpec | None = None,
    engine_class: type[Engine] = Engine,
    max_num_seqs: int = 4,
    max_queue: int = 64,
    autoscaler: Autoscaler | None = None,
) -> AsyncIterator[Replicas]:
    """Started replicas of the tiny model; looked after a hundred times a second."""
    monkeypatch.setattr(ray, "kill", LocalActor.die)
    monkeypatch.setattr(supervising, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(supervising, "SILENT_LOOKS", 200)
    monkeypatch.setattr(supervising, "FIRST_PAUSE_SECONDS", 0.01)
    actors: list[LocalActor] = []

    def load(config: ServerConfig, observer: RoundObserver) -> LocalModel:
        weights = decoder()
        own = spec or tiny_spec(weights)
        engine = engine_class(
            weights,
            own,
            EngineConfig(config.max_num_seqs, config.max_queue, observer=observer),
        )
        engine.start()
        return LocalModel(engine, own)

    class Resources:
        def start(self, config: ServerConfig, loader: Loader) -> LocalActor:
            actors.append(LocalActor(Replica(config, loader)))
            return actors[-1]

    config = ServerConfig(
        model_name="local", replicas=number, max_num_seqs=max_num_seqs, max_queue=max_queue
    )
    pool = ReplicaPool("local", max_num_seqs, max_queue)
    scaler = autoscaler or Autoscaler(Bounds.parse(number), 10**9)
    watcher = Supervisor(config, pool, Resources(), scaler, load, Listener("127.0.0.1"))
    pool.on_stop = watcher.close
    started = Replicas(pool, watcher, actors)
    try:
        await watcher.start()
        await started.until(lambda: len(actors) >= Bounds.parse(number).low)
        await started.until(lambda: all(link.state is State.READY for link in pool.links))
        yield started
    finally:
        pool.stop()


async def answers(pool: ReplicaPool, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    """The tokens of requests that are submitted at once."""
    streams = pool.submit(requests)
    return list(await asyncio.gather(*(tokens_of(stream) for stream in streams)))


async def tokens_of(stream: GenerationStream) -> tuple[int, ...]:
    events: list[GenerationEvent] = [event async for event in stream]
    return tuple(token for event in events for token in event.token_ids)
