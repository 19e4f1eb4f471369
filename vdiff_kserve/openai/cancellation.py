"""Clients that wait, and that go away: streams are kept open, and what was begun is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that ask proxies to pass chunks on as they come."""
SILENCE = 15.0
"""Seconds without an event after which a stream says that it is still there: half of the shortest
limit that proxies commonly have for silent connections."""
COMMENT = b": waiting\n\n"
"""A line that every client of server-sent events skips."""


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
    """Server-sent events from a generator that is closed when it ends or is cancelled.

    A request may wait long in the queue, or for a block to be finished. Meanwhile comments keep
    proxies from cutting the connection.

    Args:
        silence: seconds without an event after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], silence: float = SILENCE) -> None:
        super().__init__(events, headers=UNBUFFERED)
        self._events = events
        self._silence = silence

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002  Starlette's signature
        receive: Receive,  # noqa: ARG002  `CancelOnDisconnect` watches the client
        send: Send,
    ) -> None:
        """Send the stream."""
        clock = asyncio.get_running_loop().time
        latest: float | None = None
        """When something was sent; None before the beginning and from the end on."""

        async def timed_send(message: Message) -> None:
            nonlocal latest
            is_more = message["type"] == "http.response.start" or message.get("more_body", False)
            latest = clock() if is_more else None
            await send(message)

        async def comment() -> None:
            with suppress(OSError):  # the client is gone
                while True:
                    silent = 0.0 if latest is None else clock() - latest
                    if silent >= self._silence:
                        silent = 0.0
                        await timed_send(
                            {"type": "http.response.body", "body": COMMENT, "more_body": True}
                        )
                    await asyncio.sleep(self._silence - silent)

        commenting = asyncio.create_task(comment())
        try:
            await self.stream_response(timed_send)
        finally:
            commenting.cancel()
            await self._events.aclose()
