"""A replica: an engine in a Ray actor's process."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import ray

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.channel import Channel
from vdiff_kserve.distributed.meeting import Invitation, follow
from vdiff_kserve.distributed.messages import (
    Batch,
    Command,
    EngineLoad,
    ReplicaFacts,
    Submit,
    ends,
)
from vdiff_kserve.engine import (
    EngineError,
    GenerationEvent,
    LocalEngine,
    RoundObserver,
    RoundReport,
)
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.observability import logs
from vdiff_kserve.openai.limits import ServingLimits

T = TypeVar("T")

HEARTBEAT_SECONDS = 1.0
"""A replica says this often that it is well, or not."""


class ReplicaModel(Protocol):
    """What a loader makes: `LoadedModel`, or a stand-in around another engine."""

    @property
    def engine(self) -> LocalEngine: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def limits(self) -> ServingLimits: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> str: ...

    def warm_up(self) -> None:
        """Run every part of the engine once."""
        ...


Loader = Callable[[ServerConfig, RoundObserver], ReplicaModel]
"""Makes a model whose engine runs. Must be importable in the replica's process."""


class Replica:
    """The actor's class: what it runs on its asyncio loop, beside the engine's thread.

    Ray calls it once, to load. Then it calls the front end, and the two speak over that connection:
    commands come, and batches go. A batch is all that happened since the last one, and is made when
    the system has taken that: so a front end that is slow gets fewer and larger batches. When the
    connection ends, nobody is left who wants answers.
    """

    def __init__(self, config: ServerConfig, loader: Loader) -> None:
        self._config = config
        self._loader = loader
        self._engine: LocalEngine | None = None
        self._running: dict[int, Callable[[], None]] = {}
        self._events: deque[tuple[int, GenerationEvent | EngineError]] = deque()
        self._rounds: deque[RoundReport] = deque()
        self._will_tell = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel = Channel(self._obey, self._abandon, self._tell)
        self._speaking: asyncio.Task[None] | None = None

    async def ping(self) -> None:
        """Answer that the process runs."""

    async def load(self, invitation: Invitation) -> ReplicaFacts:
        """Load the model, answer a warm-up request, and call the front end.

        Raises:
            CheckpointError: the model cannot be served.
            OSError: the front end was not met.
        """
        logs.configure(self._config.log_level)
        self._loop = loop = asyncio.get_running_loop()

        def make() -> ReplicaModel:
            model = self._loader(self._config, self._note_round)
            model.warm_up()
            return model

        # On a thread that ends: the OpenMP threads of this one would slow down the engine's own.
        with ThreadPoolExecutor(max_workers=1) as thread:
            model = await loop.run_in_executor(thread, make)
        self._engine = model.engine
        self._speaking = loop.create_task(self._speak(await follow(invitation)))
        return ReplicaFacts(
            model.spec,
            model.limits,
            model.dtype,
            model.device,
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
        )

    def _obey(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._submit(command)
        elif (abort := self._running.pop(command.key, None)) is not None:
            abort()

    def _submit(self, command: Submit) -> None:
        assert self._engine is not None
        left = command.seconds_left
        deadline = None if left is None else time.monotonic() + left
        note = partial(self._note_event, command.key)
        try:
            (abort,) = self._engine.post([replace(command.request, deadline=deadline)], [note])
        except EngineError as error:
            note(error)
        else:
            self._running[command.key] = abort

    def _abandon(self, _: str) -> None:
        """Take out all requests: the front end is gone."""
        for abort in self._running.values():
            abort()
        self._running.clear()

    def _note_event(self, key: int, event: GenerationEvent | EngineError) -> None:
        """Called on the engine's thread, as `_note_round`."""
        self._events.append((key, event))
        self._tell_soon()

    def _note_round(self, report: RoundReport) -> None:
        self._rounds.append(report)
        self._tell_soon()

    def _tell_soon(self) -> None:
        if not self._will_tell:
            assert self._loop is not None
            self._will_tell = True
            with suppress(RuntimeError):  # the loop may be closed, with nobody left to tell
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        """Send what there is to tell, unless the last batch is still on its way."""
        self._will_tell = False  # from here on, what comes is told by a further call
        if self._channel.is_writable and (self._events or self._rounds):
            self._send_batch()

    async def _speak(self, connection: socket.socket) -> None:
        """Begin when the front end does, then send a batch every second, even an empty one."""
        await self._channel.begin(connection, called=False)
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if self._channel.is_writable:
                self._send_batch()

    def _send_batch(self) -> None:
        engine = self._engine
        assert engine is not None
        events = _taken(self._events)
        for key, event in events:
            if ends(event):
                self._running.pop(key, None)
        load = EngineLoad(
            engine.num_running, engine.num_waiting, engine.kv_tokens_used, engine.kv_tokens_total
        )
        self._channel.send(Batch(events, _taken(self._rounds), load, _trouble(engine)))


def _taken(things: deque[T]) -> list[T]:
    """What is there now, in order; another thread may add more meanwhile."""
    return [things.popleft() for _ in range(len(things))]


def _trouble(engine: LocalEngine) -> str | None:
    if not engine.alive:
        return "its engine failed"
    return "its engine is stuck in a round" if engine.stuck else None
