"""Only a replica that was invited is listened to, and it listens only to who invited it."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from vdiff_kserve.distributed import meeting
from vdiff_kserve.distributed.meeting import (
    NUMBER,
    Invitation,
    Listener,
    MeetingError,
    arrival,
    follow,
)


@asynccontextmanager
async def listening() -> AsyncIterator[Listener]:
    listener = Listener("127.0.0.1")
    try:
        yield listener
    finally:
        listener.close()


async def call(invitation: Invitation, *words: bytes) -> bytes:
    """All that is answered to a caller who says words and waits."""
    reader, writer = await asyncio.open_connection(invitation.host, invitation.port)
    try:
        for word in words:
            writer.write(word)
        async with asyncio.timeout(10):
            return await reader.read(-1)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_who_was_invited_is_let_in_and_the_rest_of_the_line_is_theirs() -> None:
    loop = asyncio.get_running_loop()
    async with listening() as listener:
        with listener.invite() as (invitation, connection):
            theirs = await follow(invitation)
            await loop.sock_sendall(theirs, b"hello")
            ours = await arrival(connection)
            assert await loop.sock_recv(ours, 100) == b"hello"
            await loop.sock_sendall(ours, b"welcome")
            assert await loop.sock_recv(theirs, 100) == b"welcome"
        theirs.close()
        ours.close()


async def test_each_replica_has_its_own_connection() -> None:
    loop = asyncio.get_running_loop()
    async with listening() as listener:
        with listener.invite() as (first, one), listener.invite() as (second, two):
            for invitation in (second, first):
                with await follow(invitation) as caller:
                    await loop.sock_sendall(caller, invitation.number.to_bytes())
            for invitation, connection in ((first, one), (second, two)):
                with await arrival(connection) as caller:
                    assert await loop.sock_recv(caller, 1) == invitation.number.to_bytes()


async def test_an_invitation_serves_once() -> None:
    async with listening() as listener:
        with (
            listener.invite() as (invitation, connection),
            await follow(invitation),
            await arrival(connection),
            pytest.raises(MeetingError, match="hung up"),
        ):
            await follow(invitation)


async def test_an_invitation_ends() -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, _):
            pass
        with pytest.raises(MeetingError, match="hung up"):
            await follow(invitation)


async def test_a_wrong_secret_is_refused_by_both() -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, connection):
            wrong = replace(invitation, secret=bytes(32))
            with pytest.raises(MeetingError, match="its proof is wrong"):
                await follow(wrong)
            number, nonce = NUMBER.pack(invitation.number), bytes(32)
            answer = await call(wrong, number + nonce, wrong.proof("replica", nonce, bytes(32)))
            assert len(answer) == 64
            assert not connection.done()
            with await follow(invitation), await arrival(connection):
                pass


async def test_the_front_ends_own_proof_is_none_of_a_replica() -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, connection):
            reader, writer = await asyncio.open_connection(invitation.host, invitation.port)
            writer.write(NUMBER.pack(invitation.number) + bytes(32))
            answer = await reader.readexactly(64)
            writer.write(answer[32:])
            assert await asyncio.wait_for(reader.read(-1), 10) == b""
            assert not connection.done()
            writer.close()


opened: list[str] = []


class Trap:
    """Remembers that it was unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return opened.append, ("opened",)


@pytest.mark.parametrize("knows_a_number", [False, True])
async def test_what_a_stranger_sends_is_not_unpickled(knows_a_number: bool) -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, connection):
            number = NUMBER.pack(invitation.number) if knows_a_number else b""
            await call(invitation, number + pickle.dumps(Trap()) * 10)
            assert not connection.done()
    assert opened == []


async def test_a_silent_caller_is_hung_up_on_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, connection):
            silent = [socket.create_connection((invitation.host, invitation.port)) for _ in "ab"]
            with await follow(invitation), await arrival(connection):
                pass
            monkeypatch.setattr(meeting, "MEETING_SECONDS", 0.05)
            assert await call(invitation) == b""
            for each in silent:
                each.close()


async def test_a_call_that_cannot_be_taken_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the process has too many files open."""
    loop = asyncio.get_running_loop()
    accept, calls = loop.sock_accept, 0

    async def sock_accept(listening: socket.socket) -> tuple[socket.socket, object]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(24, "Too many open files")
        return await accept(listening)

    monkeypatch.setattr(meeting, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(loop, "sock_accept", sock_accept)
    async with listening() as listener:
        with (
            listener.invite() as (invitation, connection),
            await follow(invitation),
            await arrival(connection),
        ):
            assert calls > 1


async def test_a_front_end_that_is_not_there_is_named() -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, _):
            pass
    with pytest.raises(MeetingError, match=f"127.0.0.1, port {invitation.port}, was not met"):
        await follow(invitation)


async def test_a_replica_that_does_not_call_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 0.01)
    async with listening() as listener:
        with (
            listener.invite() as (_, connection),
            pytest.raises(MeetingError, match="did not call"),
        ):
            await arrival(connection)


async def test_a_port_that_is_taken_is_told() -> None:
    async with listening() as listener:
        with listener.invite() as (invitation, _), pytest.raises(OSError, match="in use"):
            Listener("127.0.0.1", invitation.port)


def test_the_secret_is_not_shown() -> None:
    assert "secret" not in repr(Invitation("127.0.0.1", 1, 2, b"secret"))
