"""How refusals reach HTTP clients, and the boundary that lets no exception through."""

from __future__ import annotations

import logging
from http import HTTPStatus

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
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vdiff_kserve.openai.cancellation import CancelOnDisconnect
from vdiff_kserve.openai.errors import RequestError, internal_error, invalid_body

logger = logging.getLogger("kserve.vdiff.openai")

KSERVE_ERRORS: dict[type[Exception], HTTPStatus] = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    ModelNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    ServerNotLive: HTTPStatus.SERVICE_UNAVAILABLE,
    ServerNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""KServe's own handlers for these answer the same, but log each with a traceback."""


def install(app: FastAPI) -> None:
    """Make `app` tell refusals in OpenAI's shape on OpenAI's paths, in KServe's on the others."""
    app.add_exception_handler(RequestError, _refuse)
    for kind in KSERVE_ERRORS:
        app.add_exception_handler(kind, _refuse_as_kserve)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(ErrorBoundary)


def _speaks_openai(path: str) -> bool:
    return ":" not in path.rpartition("/")[2] and not path.startswith("/v2/")


def _response(request: Request, error: RequestError) -> Response:
    content = (
        error.response.model_dump()
        if _speaks_openai(request.url.path)
        else {"error": error.message}
    )
    return JSONResponse(content, error.status, error.headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _response(request, error)


async def _refuse_as_kserve(request: Request, error: Exception) -> Response:
    return _response(request, RequestError(str(error), status=_kserve_status(error)))


def _kserve_status(error: Exception) -> HTTPStatus:
    return next(status for kind, status in KSERVE_ERRORS.items() if isinstance(error, kind))


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(request, invalid_body(error.errors()))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return _response(request, RequestError(str(error.detail), param="body"))
    return await http_exception_handler(request, error)


class ErrorBoundary:
    """Turns exceptions that no handler knows into a logged 500.

    Past this point they would reach KServe's generic handler, which shows the exception to the
    client, and uvicorn would close the connection under the client's next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
            await _response(Request(scope), internal_error())(scope, receive, send)
