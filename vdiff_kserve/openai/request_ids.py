"""One id per request: the client's `X-Request-Id` or a new one, in the answer and in the log; and
the trace that it belongs to."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vdiff_kserve.observability.logs import TRACE_ID

HEADER = "X-Request-Id"
MAX_LENGTH = 64
TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may append to it."""
STRANGE = re.compile(r"[^\w.:/+=@-]", re.ASCII)


def clean_id(text: str | None) -> str:
    """An id as it may stand in a header and in a line of the log; empty when nothing is left."""
    return STRANGE.sub("_", (text or "").strip()[:MAX_LENGTH])


def trace_of(traceparent: str | None) -> str:
    """The trace that a header `traceparent` names; empty where there is none or it is malformed."""
    found = TRACEPARENT.fullmatch(traceparent or "")
    return found[1] if found else ""


def new_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


def choose_id(request: Request, asked: str | None) -> str:
    """The id of a request: the header's, else the one its body asks for, else a new one."""
    state = request.scope["state"]
    if not state["has_own_id"]:
        state["request_id"] = clean_id(asked) or state["request_id"]
    return str(state["request_id"])


class RequestIds:
    """Gives each HTTP request its id: in the headers that the application sees, in those of the
    answer, and as `request_id` in the request's state. Notes its trace for the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        TRACE_ID.set(trace_of(headers.get("traceparent")))
        given = clean_id(headers.get(HEADER))
        state = scope.setdefault("state", {})
        state["has_own_id"] = bool(given)
        state["request_id"] = given or new_id()
        MutableHeaders(scope=scope)[HEADER] = state["request_id"]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = state["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)
