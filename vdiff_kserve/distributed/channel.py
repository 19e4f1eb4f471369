"""Pickled messages over a connection, both ways and in order."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, cast

logger = logging.getLogger("kserve.vdiff.replicas")

LENGTH = struct.Struct("!I")
"""Before every message: its bytes."""
KERNEL_BYTES = 1 << 16
"""Asked of the system for what is on its way, at each end. What a reader leaves there keeps the
writer from writing more."""
TLS_SECONDS = 10.0
"""How long the ends may take to agree on keys."""


def _nothing() -> None:
    """There is nothing more to write."""


class Channel(asyncio.Protocol):
    """One end of a connection whose other end is known: it unpickles all that comes.

    Its callbacks run on the loop. `send` never waits: who has much to say looks at `is_writable`
    first and keeps the rest until `writable` is called, so that little is on its way to a reader
    that is slow.

    Args:
        receive: is given each message.
        lost: is told why the connection ended, once, unless `close` ended it.
        writable: the system has taken all that was sent.
    """

    def __init__(
        self,
        receive: Callable[[Any], None],
        lost: Callable[[str], None],
        writable: Callable[[], None] = _nothing,
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._writable = writable
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self.is_writable = False

    async def begin(self, connection: socket.socket, *, called: bool) -> None:
        """Take over a connection, both of whose ends have shown who they are.

        Where it is encrypted, this waits for the other end to begin.

        Args:
            called: whether the other end asked for it.

        Raises:
            OSError: it broke, or Ray's certificates do not do.
        """
        tls = encryption(called=called)
        loop = asyncio.get_running_loop()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, buffer, KERNEL_BYTES)
        limit = None if tls is None else TLS_SECONDS
        if called:
            await loop.connect_accepted_socket(
                lambda: self, connection, ssl=tls, ssl_handshake_timeout=limit
            )
        else:
            await loop.create_connection(
                lambda: self,
                sock=connection,
                ssl=tls,
                server_hostname=None if tls is None else "front-end",
                ssl_handshake_timeout=limit,
            )

    def send(self, message: Any) -> None:
        """Write a message, or nothing once the connection has ended."""
        if self._transport is not None:
            body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            self._transport.write(LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        """End the connection and tell nobody; any number of times."""
        self.is_writable = False
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=1)  # 0 would stop TLS with nothing left
        self.is_writable = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"its connection broke: {exc}" if exc else "its connection ended")

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True
        self._writable()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        try:
            self._take_messages()
        except Exception as error:
            logger.exception("A message could not be taken.")
            self._end(repr(error))

    def _take_messages(self) -> None:
        unread, start = self._unread, 0
        while self._transport is not None and len(unread) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(unread, start)
            body = start + LENGTH.size
            if len(unread) < body + length:
                break
            start = body + length
            self._receive(pickle.loads(unread[body:start]))
        del unread[:start]

    def _end(self, reason: str) -> None:
        if self._transport is not None:
            self.close()
            self._lost(reason)


def encryption(*, called: bool) -> ssl.SSLContext | None:
    """What Ray encrypts its own connections with, where its environment tells it to.

    Each end shows a certificate that Ray's authority signed. Whose it is does not matter: the ends
    know each other already.

    Raises:
        OSError: a file of them cannot be used.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    purpose = ssl.Purpose.CLIENT_AUTH if called else ssl.Purpose.SERVER_AUTH
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"]
    context.load_cert_chain(certificate, key)
    return context
