"""Streams to clients that have to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
from openai import AsyncOpenAI
from starlette.types import Message

from vdiff_kserve.openai.cancellation import COMMENT, EventStream

SCOPE = {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": "/", "headers": []}
CHUNK = 'data: {"id": "x", "object": "text_completion", "choices": [], "model": "llada"}\n\n'


async def never() -> Message:
    """A client that stays."""
    await asyncio.Event().wait()
    raise AssertionError


class Client:
    """What a stream sent, and whether it had to say that it is still there."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.was_told_to_wait = asyncio.Event()

    async def send(self, message: Message) -> None:
        body = message.get("body", b"")
        self.bodies.append(body)
        if body == COMMENT:
            self.was_told_to_wait.set()

    async def events(self) -> AsyncGenerator[str, None]:
        """An event, and another once the client was told to wait."""
        yield CHUNK
        await self.was_told_to_wait.wait()
        yield CHUNK


async def test_a_stream_without_events_says_that_it_is_still_there() -> None:
    client = Client()
    async with asyncio.timeout(60):
        await EventStream(client.events(), silence=0.01)(SCOPE, never, client.send)
    while_waiting = client.bodies[2:-2]
    assert set(while_waiting) == {COMMENT}
    assert client.bodies == [b"", CHUNK.encode(), *while_waiting, CHUNK.encode(), b""]


async def test_a_stream_with_events_has_nothing_else() -> None:
    client = Client()
    client.was_told_to_wait.set()
    await EventStream(client.events())(SCOPE, never, client.send)
    assert client.bodies == [b"", CHUNK.encode(), CHUNK.encode(), b""]


async def test_openais_client_skips_what_only_keeps_the_connection_open() -> None:
    body = b"".join(
        [COMMENT, CHUNK.encode(), COMMENT, CHUNK.encode(), COMMENT, b"data: [DONE]\n\n"]
    )

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=body)

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    async with AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http) as openai:
        stream = await openai.completions.create(model="llada", prompt="x", stream=True)
        assert [chunk.model async for chunk in stream] == ["llada", "llada"]
