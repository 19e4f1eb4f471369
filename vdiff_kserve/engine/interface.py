"""What a server needs of an engine, wherever the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vdiff_kserve.engine.request import EventSink, GenerationRequest
from vdiff_kserve.engine.stream import GenerationStream
from vdiff_kserve.models import ModelSpec


class GenerationEngine(Protocol):
    """Answers requests: `Engine` in this process, or many of them elsewhere."""

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        ...

    @property
    def alive(self) -> bool:
        """False once it can never answer again."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether it does not get on, and only a new start is sure to help."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it answers now."""
        ...

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def kv_tokens_total(self) -> int:
        """Canvas tokens that the key-value caches hold."""
        ...

    @property
    def kv_tokens_used(self) -> int:
        """Canvas tokens of the caches that are lent to running requests."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationStream]:
        """Queue requests, all or none; their events come on the running asyncio loop.

        Raises:
            QueueFullError: they do not all fit in the queue.
            EngineStoppedError: the engine is not running.
        """
        ...

    def stop(self) -> None:
        """Answer no more; unfinished requests get `EngineStoppedError`. From any thread."""
        ...


class LocalEngine(GenerationEngine, Protocol):
    """An engine in this process, which tells what happens on its own thread."""

    def post(
        self, requests: Sequence[GenerationRequest], sinks: Sequence[EventSink]
    ) -> list[Callable[[], None]]:
        """Queue requests, all or none; each sink is told of one request.

        Returns:
            What takes each of them out before its next forward pass; from any thread, any number
            of times.

        Raises:
            EngineError: they cannot be queued.
        """
        ...
