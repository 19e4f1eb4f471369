"""A request's events on an asyncio loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from vdiff_kserve.engine.request import EngineError, GenerationEvent


class GenerationStream:
    """Async iterator over one request's events; ends after the one with a finish reason.

    Created on a running loop. Leaving early needs `abort`, or the row runs to its end.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[GenerationEvent | EngineError] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._abort: Callable[[], None] | None = None

    def on_abort(self, abort: Callable[[], None]) -> None:
        """Set what `abort` does."""
        self._abort = abort

    def put(self, event: GenerationEvent | EngineError) -> None:
        """The engine's side; called on its thread."""
        # The loop may close at any moment, with nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.put_now, event)

    def put_now(self, event: GenerationEvent | EngineError) -> None:
        """As `put`, without the detour; called on the stream's own loop."""
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def abort(self) -> None:
        """Stop the row before its next forward pass; from any thread, any number of times."""
        if self._abort is not None:
            self._abort()

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """The events in order.

        Raises:
            EngineError: the row failed.
        """
        while True:
            while not self._events:
                self._arrival = self._loop.create_future()
                await self._arrival
            event = self._events.popleft()
            if isinstance(event, EngineError):
                raise event
            yield event
            if event.finish_reason is not None:
                return
