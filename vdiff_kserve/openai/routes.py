"""The HTTP routes beside KServe's own: OpenAI's under two prefixes, health, version and metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse

from vdiff_kserve import __version__
from vdiff_kserve.observability import metrics
from vdiff_kserve.openai.cancellation import EventStream
from vdiff_kserve.openai.dataplane import EngineDataPlane, ServedModel
from vdiff_kserve.openai.errors import RequestError, shorten, unavailable, unknown_model
from vdiff_kserve.openai.fim import FimCompletion, FimRequest
from vdiff_kserve.openai.paths import CHAT, COMPLETIONS, FIM, PREFIXES, RESPONSES
from vdiff_kserve.openai.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from vdiff_kserve.openai.request_ids import choose_id
from vdiff_kserve.openai.response_input import NOT_STORED
from vdiff_kserve.openai.response_objects import ResponseObject, ResponsesRequest
from vdiff_kserve.openai.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    InputTokens,
    TokenizeRequest,
    TokenizeResponse,
)

STORED_RESPONSE = (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))
"""What OpenAI's clients may ask about a response that was stored, behind its id."""
GENERATION_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


async def only_json(request: Request) -> None:
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
    tokens = _Tokens(dataplane, default_model)
    for prefix in PREFIXES:
        for path, handler, answer in (
            (CHAT, generation.chat, ChatCompletion),
            (COMPLETIONS, generation.completion, Completion),
            (FIM, generation.fill_in, FimCompletion),
            (RESPONSES, generation.response, ResponseObject),
        ):
            router.add_api_route(
                prefix + path,
                handler,
                methods=["POST"],
                response_model=None,
                responses={200: {"model": answer, "content": GENERATION_STREAM}},
                dependencies=[Depends(only_json)],
                tags=["OpenAI"],
            )
        for method, path in STORED_RESPONSE:
            router.add_api_route(
                f"{prefix}{RESPONSES}/{{response_id}}{path}",
                stored_response,
                methods=[method],
                response_model=None,
                status_code=HTTPStatus.NOT_FOUND,
                tags=["OpenAI"],
            )
        for path in ("/models", "/models/"):  # else the second would be a model without a name
            router.add_api_route(
                prefix + path,
                models.all,
                methods=["GET"],
                tags=["OpenAI"],
                include_in_schema=path == "/models",
            )
        router.add_api_route(
            f"{prefix}/models/{{model_name:path}}",
            models.one,
            methods=["GET"],
            tags=["OpenAI"],
        )
    conversions: dict[str, Callable[..., Any]] = {
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
        **{f"{prefix}{RESPONSES}/input_tokens": tokens.count for prefix in PREFIXES},
    }
    for path, convert in conversions.items():
        router.add_api_route(
            path,
            convert,
            methods=["POST"],
            dependencies=[Depends(only_json)],
            tags=["Tokens"],
        )
    _add_server_routes(router, _Server(dataplane))
    return router


def restart_router(restart: Callable[[], None]) -> APIRouter:
    """The route that begins a rolling restart."""
    router = APIRouter()

    async def begin() -> Response:
        """Replace the replicas one after the other; answers at once."""
        restart()
        return Response(status_code=HTTPStatus.ACCEPTED)

    router.add_api_route("/admin/restart", begin, methods=["POST"], tags=["Server"])
    return router


def _add_server_routes(router: APIRouter, server: _Server) -> None:
    for path, methods, handler, kind in (
        ("/health", ["GET"], server.health, Response),
        ("/ping", ["GET"], server.health, Response),
        ("/ping", ["POST"], server.health, Response),
        ("/load", ["GET"], server.load, JSONResponse),
        ("/version", ["GET"], server.version, JSONResponse),
        ("/metrics", ["GET"], server.metrics, PlainTextResponse),
    ):
        router.add_api_route(path, handler, methods=methods, response_class=kind, tags=["Server"])


class _Generation:
    """Chat and completion requests."""

    def __init__(self, dataplane: EngineDataPlane, default_model: str) -> None:
        self._dataplane = dataplane
        self._default_model = default_model

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        body.model = body.model or self._default_model
        body.request_id = choose_id(request, body.request_id)
        return _respond(
            await self._dataplane.create_chat_completion(
                body.model, body, request, request.headers, Response()
            )
        )

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several."""
        body.model = body.model or self._default_model
        body.request_id = choose_id(request, body.request_id)
        return _respond(
            await self._dataplane.create_completion(
                body.model, body, request, request.headers, Response()
            )
        )

    async def fill_in(self, body: FimRequest, request: Request) -> Response:
        """Write what fits between a prompt and a suffix."""
        return await self.completion(body, request)

    async def response(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer an input. Nothing is stored."""
        body.model = body.model or self._default_model
        body.request_id = choose_id(request, body.request_id)
        model = await self._dataplane.get_model(body.model)
        return _respond(await model.create_response(body))


async def stored_response(response_id: str) -> NoReturn:
    """There is none: responses are not stored, and end with the request that made them.

    Raises:
        RequestError: always.
    """
    raise RequestError(
        f"Response with id '{shorten(response_id)}' not found: {NOT_STORED}.",
        status=HTTPStatus.NOT_FOUND,
        param="response_id",
        error_type="invalid_request_error",
    )


def _respond(result: BaseModel | AsyncGenerator[str, None]) -> Response:
    if isinstance(result, AsyncGenerator):
        return EventStream(result)
    return Response(result.model_dump_json(), media_type="application/json")


class _Tokens:
    """Texts to tokens and back, without an answer."""

    def __init__(self, dataplane: EngineDataPlane, default_model: str) -> None:
        self._dataplane = dataplane
        self._default_model = default_model

    async def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a prompt, or of a conversation as the chat template writes it."""
        model = await self._dataplane.get_model(body.model or self._default_model)
        return await model.tokens.tokenize(body)

    async def detokenize(self, body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of tokens."""
        model = await self._dataplane.get_model(body.model or self._default_model)
        return await model.tokens.detokenize(body)

    async def count(self, body: ResponsesRequest) -> InputTokens:
        """How many tokens the input of a response has."""
        model = await self._dataplane.get_model(body.model or self._default_model)
        return await model.tokens.count(body)


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

    async def load(self) -> JSONResponse:
        """How many requests are being answered."""
        return JSONResponse({"server_load": self._dataplane.active})

    async def version(self) -> JSONResponse:
        """The version of this server."""
        return JSONResponse({"version": __version__})

    async def metrics(self) -> Response:
        """Prometheus's text format, whatever the scraper would accept: newer formats rename
        samples whose names have a colon."""
        return Response(metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})
