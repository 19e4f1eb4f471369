"""A replica: an engine in a Ray actor's process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import ray

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.messages import (
    Abort,
    Batch,
    Command,
    EngineLoad,
    ReplicaFacts,
    Submit,
)
from vdiff_kserve.engine import (
    EngineError,
    GenerationEngine,
    GenerationEvent,
    GenerationStream,
    RoundObserver,
    RoundReport,
)
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.observability import logs
from vdiff_kserve.openai.limits import ServingLimits

HEARTBEAT_SECONDS = 1.0
"""A replica that has nothing to tell says so this often."""


class ReplicaModel(Protocol):
    """What a loader makes: `LoadedModel`, or a stand-in around another engine."""

    @property
    def engine(self) -> GenerationEngine: ...

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
    """The actor's class. Its methods run on one asyncio loop, beside the engine's thread.

    The front end calls `control` with one list of commands at a time, so that they arrive in order,
    and `poll` again and again: each answer is all that happened meanwhile, so a front end that is
    slow gets fewer and larger batches, and nothing is sent that it has not asked for.
    """

    def __init__(self, config: ServerConfig, loader: Loader) -> None:
        self._config = config
        self._loader = loader
        self._engine: GenerationEngine | None = None
        self._running: dict[int, tuple[GenerationStream, asyncio.Task[None]]] = {}
        self._events: list[tuple[int, GenerationEvent | EngineError]] = []
        self._rounds: list[RoundReport] = []
        self._news = asyncio.Event()

    async def ping(self) -> None:
        """Answer that the process runs."""

    async def load(self) -> ReplicaFacts:
        """Load the model and answer a warm-up request.

        Raises:
            CheckpointError: the model cannot be served.
        """
        logs.configure(self._config.log_level)
        loop = asyncio.get_running_loop()

        def observe(report: RoundReport) -> None:
            with suppress(RuntimeError):  # the loop may be closed, with nobody left to tell
                loop.call_soon_threadsafe(self._note_round, report)

        def make() -> ReplicaModel:
            model = self._loader(self._config, observe)
            model.warm_up()
            return model

        # On a thread that ends: the OpenMP threads of this one would slow down the engine's own.
        with ThreadPoolExecutor(max_workers=1) as thread:
            model = await loop.run_in_executor(thread, make)
        self._engine = model.engine
        return ReplicaFacts(
            model.spec,
            model.limits,
            model.dtype,
            model.device,
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
        )

    async def control(self, commands: Sequence[Command]) -> None:
        """Carry out commands in their order."""
        for command in commands:
            if isinstance(command, Submit):
                self._submit(command)
            else:
                self._abort(command)

    async def poll(self) -> Batch:
        """What happened since the last batch, or after a second that nothing did."""
        engine = self._engine
        assert engine is not None
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), HEARTBEAT_SECONDS)
        self._news.clear()
        events, self._events = self._events, []
        rounds, self._rounds = self._rounds, []
        load = EngineLoad(
            engine.num_running, engine.num_waiting, engine.kv_tokens_used, engine.kv_tokens_total
        )
        return Batch(events, rounds, load, _trouble(engine))

    def _submit(self, command: Submit) -> None:
        assert self._engine is not None
        left = command.seconds_left
        deadline = None if left is None else time.monotonic() + left
        try:
            (stream,) = self._engine.submit([replace(command.request, deadline=deadline)])
        except EngineError as error:
            self._tell(command.key, error)
            return
        task = asyncio.create_task(self._forward(command.key, stream))
        self._running[command.key] = stream, task

    def _abort(self, command: Abort) -> None:
        if command.key in self._running:
            stream, task = self._running.pop(command.key)
            stream.abort()
            task.cancel()

    async def _forward(self, key: int, stream: GenerationStream) -> None:
        try:
            async for event in stream:
                self._tell(key, event)
        except EngineError as error:
            self._tell(key, error)
        del self._running[key]

    def _tell(self, key: int, event: GenerationEvent | EngineError) -> None:
        self._events.append((key, event))
        self._news.set()

    def _note_round(self, report: RoundReport) -> None:
        self._rounds.append(report)
        self._news.set()


def _trouble(engine: GenerationEngine) -> str | None:
    if not engine.alive:
        return "its engine failed"
    return "its engine is stuck in a round" if engine.stuck else None
