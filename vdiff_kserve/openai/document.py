"""The OpenAPI document: what is really answered, also on the routes that KServe brings."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vdiff_kserve import __version__
from vdiff_kserve.openai.paths import is_open, speaks_openai
from vdiff_kserve.openai.protocol import ErrorResponse

REASONS = {
    HTTPStatus.BAD_REQUEST: "The request is wrong.",
    HTTPStatus.UNAUTHORIZED: "The server wants an API key, and this is none.",
    HTTPStatus.FORBIDDEN: "Clients may not do this here.",
    HTTPStatus.NOT_FOUND: "No such model.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too long.",
    HTTPStatus.TOO_MANY_REQUESTS: "The queue is full, or you asked too often; `Retry-After` says "
    "when to try again.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The model failed on this request.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The model is loading or the server is stopping.",
    HTTPStatus.GATEWAY_TIMEOUT: "The request's time was over.",
}
"""Why a request is refused, by status."""
OF_BODIES = (
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.GATEWAY_TIMEOUT,
)
"""Statuses of routes that take a body."""
NOT_OURS = str(HTTPStatus.UNPROCESSABLE_ENTITY.value)
"""What FastAPI would answer to a wrong request; here it is a 400."""
KSERVES_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}


def describe(app: FastAPI) -> None:
    """Let `app` serve a document that tells the refusals of each route, in the shape of its path.

    Of two routes that answer the same path, the first one does, and so only it is told of.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title="vdiff_kserve",
                version=__version__,
                routes=app.routes[::-1],  # the last one read is the one that is told of
            )
            made["paths"] = dict(reversed(made["paths"].items()))
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    _tell_refusals(path, operation)
            schemas = made["components"]["schemas"]
            shapes = ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= shapes.pop("$defs") | {ErrorResponse.__name__: shapes}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _tell_refusals(path: str, operation: dict[str, Any]) -> None:
    schema: dict[str, Any] = KSERVES_ERROR
    if speaks_openai(path):
        schema = {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}
    responses = operation["responses"]
    responses.pop(NOT_OURS, None)
    for status in _refusals(path, has_body="requestBody" in operation):
        responses[str(status.value)] = {
            "description": REASONS[status],
            "content": {"application/json": {"schema": schema}},
        }


def _refusals(path: str, *, has_body: bool) -> list[HTTPStatus]:
    if is_open(path.replace("{model_name}", "name").replace("{model_version}", "1")):
        return [HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE]
    skipped = {HTTPStatus.FORBIDDEN} if "/repository/" not in path else set()
    if not has_body:
        skipped.update(OF_BODIES)
    return [status for status in REASONS if status not in skipped]
