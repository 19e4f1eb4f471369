"""The HTTP routes beside KServe's own: OpenAI's under two prefixes, health, version and metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse

from vdiff_kserve import __version__
from vdiff_kserve.observability import metrics
from vdiff_kserve.openai.cancellation import EventStream
from vdiff_kserve.openai.dataplane import EngineDataPlane, ServedModel
from vdiff_kserve.openai.errors import RequestError, unavailable, unknown_model
from vdiff_kserve.openai.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
)

PREFIXES = ("/openai/v1", "/v1")
REFUSALS: dict[int | str, dict[str, Any]] = {
    HTTPStatus.BAD_REQUEST.value: {"model": ErrorResponse, "description": "The request is wrong."},
    HTTPStatus.NOT_FOUND.value: {"model": ErrorResponse, "description": "No such model."},
    HTTPStatus.TOO_MANY_REQUESTS.value: {
        "model": ErrorResponse,
        "description": "The queue is full; `Retry-After` says when to try again.",
    },
    HTTPStatus.INTERNAL_SERVER_ERROR.value: {
        "model": ErrorResponse,
        "description": "The model failed on this request.",
    },
    HTTPStatus.SERVICE_UNAVAILABLE.value: {
        "model": ErrorResponse,
        "description": "The model is loading or the server is stopping.",
    },
}
GENERATION_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def only_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON.

    Raises:
        RequestError: it is something else.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            "The body must be JSON, with the header Content-Type: application/json.",
            error_type=HTTPStatus.BAD_REQUEST.phrase,
        )


def build_router(dataplane: EngineDataPlane, default_model: str) -> APIRouter:
    """The routes; requests that name no model are for `default_model`."""
    router = APIRouter()
    generation = _Generation(dataplane, default_model)
    models = _Models(dataplane)
    for prefix in PREFIXES:
        for path, handler, answer in (
            ("/chat/completions", generation.chat, ChatCompletion),
            ("/completions", generation.completion, Completion),
        ):
            router.add_api_route(
                prefix + path,
                handler,
                methods=["POST"],
                response_model=None,
                responses=REFUSALS | {200: {"model": answer, "content": GENERATION_STREAM}},
                dependencies=[Depends(only_json)],
                tags=["OpenAI"],
            )
        router.add_api_route(f"{prefix}/models", models.all, methods=["GET"], tags=["OpenAI"])
        router.add_api_route(
            f"{prefix}/models/{{model_name:path}}",
            models.one,
            methods=["GET"],
            responses={code: REFUSALS[code] for code in (404, 503)},
            tags=["OpenAI"],
        )
    server = _Server(dataplane)
    router.add_api_route("/health", server.health, methods=["GET"], tags=["Server"])
    router.add_api_route("/ping", server.health, methods=["GET", "POST"], tags=["Server"])
    router.add_api_route("/version", server.version, methods=["GET"], tags=["Server"])
    router.add_api_route("/metrics", server.metrics, methods=["GET"], tags=["Server"])
    return router


class _Generation:
    """Chat and completion requests."""

    def __init__(self, dataplane: EngineDataPlane, default_model: str) -> None:
        self._dataplane = dataplane
        self._default_model = default_model

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        body.model = body.model or self._default_model
        return _respond(
            await self._dataplane.create_chat_completion(
                body.model, body, request, request.headers, Response()
            )
        )

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several."""
        body.model = body.model or self._default_model
        return _respond(
            await self._dataplane.create_completion(
                body.model, body, request, request.headers, Response()
            )
        )


def _respond(result: BaseModel | AsyncGenerator[str, None]) -> Response:
    if isinstance(result, AsyncGenerator):
        return EventStream(result)
    return Response(result.model_dump_json(), media_type="application/json")


class _Models:
    """The model list, for OpenAI's clients and KServe V1's alike."""

    def __init__(self, dataplane: EngineDataPlane) -> None:
        self._dataplane = dataplane

    async def all(self) -> ModelList:
        """Every name that requests may use."""
        models = self._dataplane.model_registry.get_models()
        return ModelList(
            data=[_card(name, model) for name, model in models.items()], models=list(models)
        )

    async def one(self, model_name: str) -> dict[str, Any]:
        """One model, when it is ready."""
        models = self._dataplane.model_registry.get_models()
        if model_name not in models:
            raise unknown_model(model_name, tuple(models))
        model = await self._dataplane.get_model(model_name)
        return _card(model_name, model).model_dump() | {"name": model_name, "ready": True}


def _card(name: str, model: ServedModel) -> ModelCard:
    return ModelCard(id=name, root=model.name, max_model_len=model.max_model_len)


class _Server:
    """What probes and monitoring ask."""

    def __init__(self, dataplane: EngineDataPlane) -> None:
        self._dataplane = dataplane

    async def health(self) -> Response:
        """200 when requests are answered; 503 before that and while stopping."""
        if not await self._dataplane.ready():
            raise unavailable("The server is not ready.")
        return Response()

    async def version(self) -> JSONResponse:
        """The version of this server."""
        return JSONResponse({"version": __version__})

    async def metrics(self) -> Response:
        """Prometheus's text format, whatever the scraper would accept: newer formats rename
        samples whose names have a colon."""
        return Response(metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})
