"""How a replica and the front end find each other, and know each other, before either unpickles
what the other says."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger("kserve.vdiff.replicas")

MEETING_SECONDS = 5.0
"""How long a caller may take to show who it is."""
PAUSE_SECONDS = 1.0
"""After a call that the system had no means to take."""
DIGEST = "sha256"
NONCE_BYTES = PROOF_BYTES = 32
NUMBER = struct.Struct("!Q")

Role = Literal["front end", "replica"]


class MeetingError(ConnectionError):
    """A replica and the front end that did not come together."""


@dataclass(frozen=True)
class Invitation:
    """Where a replica calls the front end, and how each knows the other. It travels through Ray.

    Attributes:
        number: says which invitation a caller answers.
        secret: known to the replica and the front end alone; serves for one connection.
    """

    host: str
    port: int
    number: int
    secret: bytes = field(repr=False)

    def proof(self, role: Role, replicas_nonce: bytes, front_ends_nonce: bytes) -> bytes:
        """What only who has the secret can say, and never twice."""
        said = role.encode() + replicas_nonce + front_ends_nonce
        return hmac.digest(self.secret, said, DIGEST)


class Listener:
    """Where the front end is called by its replicas. Belongs to the running loop.

    A caller tells the number of its invitation and a nonce; the front end answers with a nonce and
    its proof, and the caller with its own. Whoever has no proof in time is hung up on.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        self._socket.setblocking(False)
        self._host, self._port = host, self._socket.getsockname()[1]
        self._numbers = itertools.count()
        self._expected: dict[int, tuple[Invitation, asyncio.Future[socket.socket]]] = {}
        self._loop = asyncio.get_running_loop()
        self._tasks = {self._loop.create_task(self._answer_calls(), name="replica-listener")}

    @contextmanager
    def invite(self) -> Iterator[tuple[Invitation, asyncio.Future[socket.socket]]]:
        """An invitation, and the connection of the replica that follows it."""
        number = next(self._numbers)
        invitation = Invitation(self._host, self._port, number, secrets.token_bytes(32))
        connection: asyncio.Future[socket.socket] = self._loop.create_future()
        self._expected[number] = invitation, connection
        try:
            yield invitation, connection
        finally:
            self._expected.pop(number, None)
            connection.cancel()

    def close(self) -> None:
        """Take no more calls."""
        for task in self._tasks:
            task.cancel()
        self._socket.close()

    async def _answer_calls(self) -> None:
        while True:
            try:
                caller, address = await self._loop.sock_accept(self._socket)
            except OSError as error:
                logger.error("A replica's call could not be taken: %s", error)
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            task = self._loop.create_task(self._answer(caller, address[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, caller: socket.socket, address: str) -> None:
        try:
            async with asyncio.timeout(MEETING_SECONDS):
                number = await self._recognize(caller)
        except OSError as error:
            caller.close()
            logger.warning(
                "A caller from %s is no replica: %s.", address, str(error) or "it was silent"
            )
        except asyncio.CancelledError:
            caller.close()
            raise
        else:
            _, connection = self._expected.pop(number)
            connection.set_result(caller)

    async def _recognize(self, caller: socket.socket) -> int:
        """The number of the invitation that a caller has."""
        (number,) = NUMBER.unpack(await _read(caller, NUMBER.size))
        theirs = await _read(caller, NONCE_BYTES)
        if number not in self._expected:
            raise MeetingError("it was not invited")
        invitation, _ = self._expected[number]
        mine = secrets.token_bytes(NONCE_BYTES)
        await self._loop.sock_sendall(caller, mine + invitation.proof("front end", theirs, mine))
        proof = await _read(caller, PROOF_BYTES)
        if not hmac.compare_digest(proof, invitation.proof("replica", theirs, mine)):
            raise MeetingError("its proof is wrong")
        if number not in self._expected:
            raise MeetingError("its invitation is over")
        return number


async def arrival(connection: asyncio.Future[socket.socket]) -> socket.socket:
    """The connection of a replica that says it has called.

    Raises:
        MeetingError: it did not.
    """
    try:
        async with asyncio.timeout(MEETING_SECONDS):
            return await connection
    except TimeoutError as error:
        raise MeetingError("The replica did not call the front end.") from error


async def follow(invitation: Invitation) -> socket.socket:
    """Call the front end, as the replica that has the invitation.

    Raises:
        MeetingError: it does not answer, or is another.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in invitation.host else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(MEETING_SECONDS):
            await loop.sock_connect(connection, (invitation.host, invitation.port))
            mine = secrets.token_bytes(NONCE_BYTES)
            await loop.sock_sendall(connection, NUMBER.pack(invitation.number) + mine)
            theirs = await _read(connection, NONCE_BYTES)
            proof = await _read(connection, PROOF_BYTES)
            if not hmac.compare_digest(proof, invitation.proof("front end", mine, theirs)):
                raise MeetingError("its proof is wrong")
            await loop.sock_sendall(connection, invitation.proof("replica", mine, theirs))
    except OSError as error:
        connection.close()
        raise MeetingError(
            f"The front end at {invitation.host}, port {invitation.port}, was not met: "
            f"{str(error) or 'it was silent'}"
        ) from error
    except asyncio.CancelledError:
        connection.close()
        raise
    return connection


async def _read(connection: socket.socket, length: int) -> bytes:
    """As many bytes; what follows them stays unread."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < length:
        more = await loop.sock_recv(connection, length - len(data))
        if not more:
            raise MeetingError("it hung up")
        data += more
    return data
