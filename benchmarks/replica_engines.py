"""Engines for replicas whose answers cost nothing: what is left is the way there and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.instant import InstantEngine
from vdiff_kserve import loading
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.engine import (
    EngineStoppedError,
    GenerationRequest,
    GenerationStream,
    RoundObserver,
)
from vdiff_kserve.loading import LoadedModel, load_model

CHUNK_SECONDS = 0.02
"""Between two events of a paced answer, as between two rounds of an engine."""


class PacedEngine(InstantEngine):
    """Answers a chunk at a time, all requests together, and stamps each with when it was sent.

    The stamp is `stats.queue_seconds`, on the clock of `time.monotonic`, which the processes of a
    machine share.
    """

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationStream]:
        """Streams to which a task of the running loop writes.

        Raises:
            EngineStoppedError: the engine is not running.
        """
        if not self.alive:
            raise EngineStoppedError("The engine is not running.")
        streams = [GenerationStream() for _ in requests]
        for request, stream in zip(requests, streams, strict=True):
            task = asyncio.create_task(self._write(request, stream))
            stream.on_abort(task.cancel)
        return streams

    async def _write(self, request: GenerationRequest, stream: GenerationStream) -> None:
        started = time.monotonic()
        for number, event in enumerate(self._events(request), start=1):
            await asyncio.sleep(started + number * CHUNK_SECONDS - time.monotonic())
            stamp = time.monotonic()
            stream.put(replace(event, stats=replace(event.stats, queue_seconds=stamp)))


def instant_model(config: ServerConfig, observer: RoundObserver | None = None) -> LoadedModel:
    """A model whose engine answers at once, with the whole answer in one event."""
    InstantEngine.tokens_per_chunk = config.default_max_tokens
    return _with_engine(InstantEngine, config, observer)


def paced_model(config: ServerConfig, observer: RoundObserver | None = None) -> LoadedModel:
    """A model whose engine answers a token at a time."""
    InstantEngine.tokens_per_chunk = 1
    return _with_engine(PacedEngine, config, observer)


def _with_engine(
    engine: type[InstantEngine], config: ServerConfig, observer: RoundObserver | None
) -> LoadedModel:
    own = loading.Engine
    loading.Engine = engine  # type: ignore[misc]
    try:
        return load_model(config, observer)
    finally:
        loading.Engine = own  # type: ignore[misc]
