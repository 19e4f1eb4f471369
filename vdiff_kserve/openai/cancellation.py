"""Clients that go away: what was begun for them is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that ask proxies to pass chunks on as they come."""


class CancelOnDisconnect:
    """Cancels a request whose client closed its connection, on every route.

    Without it only OpenAI's streams would notice: FastAPI runs other handlers to their end, and
    KServe's V1 and V2 routes are among them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def run() -> None:
            await self._app(scope, messages.get, send)

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                messages.put_nowait(message)
            messages.put_nowait(message)
            running.cancel()

        running = asyncio.create_task(run())
        watching = asyncio.create_task(watch())
        try:
            await running
        except asyncio.CancelledError:
            if not watching.done():
                raise
        finally:
            watching.cancel()


class EventStream(StreamingResponse):
    """Server-sent events from a generator that is closed as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers=UNBUFFERED)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
