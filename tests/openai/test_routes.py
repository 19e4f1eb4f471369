"""The routes over a model whose state the test decides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException
from kserve import Model, ModelRepository
from kserve.errors import InvalidInput
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints

from vdiff_kserve.observability import families
from vdiff_kserve.openai import OpenAIGenerativeModel, handlers
from vdiff_kserve.openai.dataplane import EngineDataPlane, FixedRepository
from vdiff_kserve.openai.guards import Access
from vdiff_kserve.openai.routes import build_router

CHAT = {"messages": [{"role": "user", "content": "x"}]}


class StubModel(Model, OpenAIGenerativeModel):
    """Answers, is not ready, is dead or breaks, as it is told."""

    max_model_len = None

    def __init__(self) -> None:
        super().__init__("stub")
        self.alive = True
        self.not_ready_reason: str | None = None
        self.fault: Exception | None = None

    async def healthy(self) -> bool:
        return self.not_ready_reason is None

    async def create_completion(self, *_: Any, **__: Any) -> Any:
        raise self.fault or RuntimeError("secret")

    create_chat_completion = create_response = create_completion

    async def predict(self, *_: Any, **__: Any) -> Any:
        raise self.fault or RuntimeError("secret")


@pytest.fixture
def model() -> StubModel:
    return StubModel()


@pytest.fixture
async def http(model: StubModel) -> AsyncIterator[httpx.AsyncClient]:
    registry = ModelRepository()
    registry.update(model)
    dataplane = EngineDataPlane(registry)
    app = FastAPI()
    handlers.install(app, "stub", Access((), ()), max_body_bytes=1 << 20)
    app.include_router(build_router(dataplane, "stub"))
    register_v1_endpoints(app, dataplane, FixedRepository(registry))
    register_v2_endpoints(app, dataplane, FixedRepository(registry))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://stub") as client:
        yield client


async def test_nothing_is_answered_before_the_model_is_ready(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    assert (await http.get("/health")).status_code == 200
    model.not_ready_reason = "The model is still loading."
    for path in (
        "/health",
        "/ping",
        "/v1/models/stub",
        "/v2/models/stub/ready",
        "/v2/health/ready",
    ):
        assert (await http.get(path)).status_code == 503, path
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/openai/v1/completions", {"prompt": "x"}),
        ("/v1/models/stub:predict", {"instances": ["x"]}),
    ):
        response = await http.post(path, json=body)
        assert response.status_code == 503, path
    refused = await http.post("/v1/chat/completions", json=CHAT)
    assert refused.json()["error"]["message"] == "The model is still loading."
    assert refused.headers["retry-after"]
    assert (await http.get("/v2/health/live")).status_code == 200
    assert (await http.get("/v1/models")).status_code == 200


async def test_grpc_to_a_model_that_is_not_ready_is_unavailable(model: StubModel) -> None:
    registry = ModelRepository()
    registry.update(model)
    model.not_ready_reason = "The model is still loading."
    servicer = InferenceServicer(EngineDataPlane(registry), FixedRepository(registry))
    context = SimpleNamespace(invocation_metadata=list)
    with pytest.raises(GrpcException, match="still loading") as caught:
        await servicer.ModelInfer(pb.ModelInferRequest(model_name="stub"), context)
    assert caught.value.status_code is StatusCode.UNAVAILABLE
    assert not (await servicer.ModelReady(pb.ModelReadyRequest(name="stub"), context)).ready
    assert not (await servicer.ServerReady(pb.ServerReadyRequest(), context)).ready


async def test_requests_refused_while_the_model_loads_are_counted_once(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    def counted() -> list[float]:
        return [
            families.ERRORS.labels("stub", endpoint, "unavailable")._value.get()
            for endpoint in families.ENDPOINTS
        ]

    before = counted()
    model.not_ready_reason = "The model is still loading."
    for path in ("/v1/chat/completions", "/openai/v1/completions", "/v1/responses"):
        body = {"input": "x"} if path.endswith("responses") else CHAT | {"prompt": "x"}
        assert (await http.post(path, json=body)).status_code == 503
    assert (await http.post("/v1/models/stub:predict", json={})).status_code == 503
    assert (await http.post("/v2/models/stub/infer", json={"inputs": []})).status_code == 503
    assert (await http.get("/v2/models/stub/ready")).status_code == 503
    assert counted() == [count + 1 for count in before]


async def test_the_server_is_not_live_when_the_engine_died(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    model.alive = False
    response = await http.get("/v2/health/live")
    assert response.status_code == 503
    assert response.json() == {"error": "Server is not live."}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/models/stub:predict", {"instances": ["x"]}),
    ],
)
async def test_an_unexpected_fault_is_a_logged_500(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Internal server error" in response.text
    assert "secret" in caplog.text


async def test_kserves_own_refusals_keep_their_status(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    model.fault = InvalidInput("not like this")
    response = await http.post("/v1/models/stub:predict", json={"instances": ["x"]})
    assert response.status_code == 400
    assert response.json() == {"error": "not like this"}
    response = await http.get("/v1/completions")
    assert response.status_code == 405
