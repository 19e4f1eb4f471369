"""How refusals reach HTTP clients and the metrics, and the boundary that no exception passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from kserve.errors import (
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerNotLive,
    ServerNotReady,
)
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vdiff_kserve.observability.requests import count_refusal
from vdiff_kserve.openai.cancellation import CancelOnDisconnect
from vdiff_kserve.openai.errors import (
    RequestError,
    internal_error,
    invalid_body,
    nested_too_deep,
    shorten,
)
from vdiff_kserve.openai.guards import Access, Guard, Refuse
from vdiff_kserve.openai.paths import endpoint_of, is_open, speaks_openai, why_absent
from vdiff_kserve.openai.request_ids import HEADER, RequestIds

logger = logging.getLogger("kserve.vdiff.openai")

KSERVE_ERRORS: dict[type[Exception], HTTPStatus] = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    ModelNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    ServerNotLive: HTTPStatus.SERVICE_UNAVAILABLE,
    ServerNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    NotImplementedError: HTTPStatus.NOT_FOUND,  # versions of a model, explanations
}
"""KServe's own handlers for these answer the same, but log each with a traceback."""


def install(
    app: FastAPI,
    model_name: str,
    access: Access,
    max_body_bytes: int,
    allowed_origins: Sequence[str] = (),
    open_paths: Sequence[str] = (),
) -> None:
    """Put the guards before `app`, and make it tell refusals in OpenAI's shape on OpenAI's paths,
    in KServe's on the others.

    Args:
        model_name: whose refusals the metrics count.
        access: lets requests in.
        max_body_bytes: longest body of a request.
        allowed_origins: whose pages may read answers in a browser.
        open_paths: paths that need no key, beside those of probes.
    """
    refusals = Refusals(model_name)
    app.add_exception_handler(RequestError, refusals.refuse)
    for kind in KSERVE_ERRORS:
        app.add_exception_handler(kind, refusals.refuse_as_kserve)
    app.add_exception_handler(RequestValidationError, refusals.refuse_body)
    app.add_exception_handler(HTTPException, refusals.refuse_http)
    # Each one goes around those before it.
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(
        Guard,
        access=access,
        max_body_bytes=max_body_bytes,
        refuse=refusals.response,
        open_paths=open_paths,
    )
    app.add_middleware(ErrorBoundary, refuse=refusals.response)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )
    app.add_middleware(RequestIds)


class Refusals:
    """Turns refusals into responses, and counts and logs them: each once."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def response(self, scope: Scope, error: RequestError) -> Response:
        """The response that tells a refusal in the shape of its path."""
        path = scope["path"]
        endpoint = endpoint_of(scope["method"], path)
        if endpoint is not None and not error.counted:
            count_refusal(self._model_name, endpoint, error.status, error)
        if not is_open(path):
            request_id = scope["state"]["request_id"]
            what = endpoint or shorten(quote(path))
            field = refused_field(error)
            fields = {"endpoint": what, "request_id": request_id, "status": error.status}
            logger.info(
                "%s %s %d: refused, %s%s",
                *(what, request_id, error.status, error.type, f", {field}" if field else ""),
                extra={"fields": fields | {"error": error.type, "field": field}},
            )
        content = error.response.model_dump() if speaks_openai(path) else {"error": error.message}
        return JSONResponse(content, error.status, error.headers)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Tell a refusal of ours."""
        assert isinstance(error, RequestError)
        return self.response(request.scope, error)

    async def refuse_as_kserve(self, request: Request, error: Exception) -> Response:
        """Tell a refusal of KServe's."""
        status = next(s for kind, s in KSERVE_ERRORS.items() if isinstance(error, kind))
        return self.response(request.scope, RequestError(str(error), status=status))

    async def refuse_body(self, request: Request, error: Exception) -> Response:
        """Tell that a body is not the route's."""
        assert isinstance(error, RequestValidationError)
        return self.response(request.scope, invalid_body(error.errors(), error.body))

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        """Tell what the router or FastAPI refuses."""
        assert isinstance(error, HTTPException)
        status, path = error.status_code, request.url.path
        if status == HTTPStatus.BAD_REQUEST:
            return self.response(request.scope, unreadable(error))
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            headers = error.headers or {}
            allowed = headers.get("Allow")
            takes = f"It takes {allowed}. " if allowed else ""
            why = f"{takes}{why_absent(path)}"
            message = f"There is no route {request.method} {shorten(path)}. {why}".rstrip()
            response = self.response(
                request.scope, RequestError(message, status=HTTPStatus(status))
            )
            response.headers.update(headers)
            return response
        return await http_exception_handler(request, error)


def refused_field(error: RequestError) -> str | None:
    """The field of the request that an error is about, for the log: without what is inside of it,
    which may be text of the client's."""
    field = (error.param or "").removeprefix("body.").partition(".")[0]
    return shorten(quote(field)) if field else None


def unreadable(error: HTTPException) -> RequestError:
    """A body that FastAPI could not read, with the reason that it keeps to itself."""
    if isinstance(error.__cause__, RecursionError):
        return nested_too_deep()
    if isinstance(error.__cause__, UnicodeDecodeError):
        return RequestError("The body is not UTF-8.", param="body")
    return RequestError(str(error.detail), param="body")


class ErrorBoundary:
    """Turns exceptions that no handler knows into a logged 500.

    Past this point they would reach KServe's generic handler, which shows the exception to the
    client, and uvicorn would close the connection under the client's next request.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            if begun or scope["type"] != "http":
                raise
            logger.exception("%s %s failed unexpectedly.", scope["method"], scope["path"])
            await self._refuse(scope, internal_error())(scope, receive, send)
