"""Who may use the server, how often, and how much they may send."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from grpc import aio  # type: ignore[import-untyped]
from grpc_interceptor.server import AsyncServerInterceptor
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vdiff_kserve.openai.errors import RequestError, shorten
from vdiff_kserve.openai.paths import is_open

SHARED_V6_BITS = 64
"""An IPv6 network of this length belongs to one subscriber, who has all its addresses."""
OPEN_METHODS = ("ServerLive", "ServerReady", "ModelReady")
"""What probes ask over gRPC."""

Refuse = Callable[[Scope, RequestError], Response]


class Access:
    """Lets requests in that have a key and are not too many.

    Args:
        keys: whoever sends one of them is let in; with none, everyone is.
        rates: most requests of one key, or of one address where there are no keys or the key is
            wrong; such as "60/minute".
    """

    def __init__(self, keys: Sequence[str], rates: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]
        self._rates: list[RateLimitItem] = [parse(rate) for rate in rates]
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def admit(self, authorization: bytes | None, address: str | None) -> None:
        """Let a request in.

        Args:
            authorization: the value of its header of that name.
            address: where it comes from.

        Raises:
            RequestError: it has no key (401), or its sender asks too often (429).
        """
        key = self._key_number(authorization)
        await self._count(f"address {network_of(address)}" if key is None else f"key {key}")
        if self._digests and key is None:
            raise RequestError(
                f"{_wrong_with(authorization)} This server needs an API key, in the header "
                "Authorization: Bearer <key>.",
                status=HTTPStatus.UNAUTHORIZED,
            )

    def _key_number(self, authorization: bytes | None) -> int | None:
        """Which of the keys was sent. Takes the same time for every wrong one."""
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = _digest(token.strip())
        found = None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found

    async def _count(self, sender: str) -> None:
        for rate in self._rates:
            if not await self._limiter.hit(rate, sender):
                again, _ = await self._limiter.get_window_stats(rate, sender)
                raise RequestError(
                    f"More than {rate} were sent. Try again later.",
                    status=HTTPStatus.TOO_MANY_REQUESTS,
                    retry_after=max(1, math.ceil(again - time.time())),
                )


def _wrong_with(authorization: bytes | None) -> str:
    scheme, _, token = (authorization or b"").partition(b" ")
    if not token.strip() and scheme.lower() in (b"", b"bearer"):
        return "The request has no API key."
    if scheme.lower() != b"bearer":
        return "The Authorization header does not begin with Bearer."
    return "The API key of the request is not one of this server's."


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def network_of(address: str | None) -> str:
    """The address whose requests are counted together: an IPv6 client has a whole network."""
    try:
        known = ipaddress.ip_address(address or "")
    except ValueError:
        return address or "unknown"
    if isinstance(known, ipaddress.IPv4Address):
        return str(known)
    network = ipaddress.ip_network((known, SHARED_V6_BITS), strict=False)
    return str(known.ipv4_mapped or network)


class Guard:
    """Stands before the routes: refuses requests without a key, too many of them, and bodies that
    are compressed or too long, before anything is done for them.

    The rest of a refused body is read and dropped by the HTTP server, so that its client gets the
    answer and can go on with the connection.

    Args:
        refuse: makes a refusal into the response for its path.
        open_paths: further paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        max_body_bytes: int,
        refuse: Refuse,
        open_paths: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes
        self._refuse = refuse
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or refuse the request."""
        if scope["type"] == "http":
            try:
                await self._check_sender(scope)
                body = await self._read(scope, receive)
            except RequestError as error:
                await self._refuse(scope, error)(scope, receive, send)
                return
            if body is None:
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    async def _check_sender(self, scope: Scope) -> None:
        path = scope["path"]
        if is_open(path) or path in self._open_paths:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        client = scope.get("client")
        await self._access.admit(given[0] if given else None, client[0] if client else None)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, whatever it was cut into; None when the client left.

        Raises:
            RequestError: it is compressed, or too long; nothing more of it is kept.
        """
        headers = Headers(scope=scope)
        if (coding := headers.get("content-encoding", "identity")).lower() != "identity":
            raise RequestError(
                f"The body must be sent without Content-Encoding, got {shorten(coding)}.",
                param="body",
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_long()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_long()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_long(self) -> RequestError:
        return RequestError(
            f"The body must have at most {self._max_body_bytes} bytes.",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            param="body",
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, then whatever comes after it."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal first
        message, first = first, None
        return await receive() if message is None else message

    return replayed


class RpcGuard(AsyncServerInterceptor):
    """The same for gRPC: keys come as `authorization` in the call's metadata.

    Args:
        count: told of each refusal that the service has not counted itself.
    """

    def __init__(self, access: Access, count: Callable[[str, RequestError], None]) -> None:
        self._access = access
        self._count = count

    async def intercept(
        self,
        method: Callable[..., Awaitable[Any]],
        request_or_iterator: Any,
        context: aio.ServicerContext,
        method_name: str,
    ) -> Any:
        """Answer a call, or refuse it."""
        name = method_name.rpartition("/")[2]
        try:
            if name not in OPEN_METHODS:
                given = dict(context.invocation_metadata() or ()).get("authorization")
                given = given.encode() if isinstance(given, str) else given
                await self._access.admit(given, peer_address(context.peer()))
            return await method(request_or_iterator, context)
        except RequestError as error:
            self._count(name, error)
            raise


def peer_address(peer: str) -> str:
    """The address in what gRPC calls a peer, such as ipv4:10.0.0.7:51234 or ipv6:[::1]:51234."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")
