"""Keys, body lengths, rates, origins, and the repository: what stands before the routes."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from openai import AuthenticationError, OpenAI, RateLimitError

from tests.server.conftest import COMMON
from tests.server.process import ServerProcess
from tests.server.test_errors import error_of
from tests.waiting import wait_until
from vdiff_kserve.__main__ import announce
from vdiff_kserve.config import ServerConfig

KEYS = ("sk-first-of-two", "sk-second-of-two")
WRONG = "sk-nobodys"
BEARER = {"Authorization": f"Bearer {KEYS[0]}"}
MAX_BODY = 20_000
ORIGIN = "https://chat.example.org"
PROMPT = {"prompt": "x", "max_tokens": 2}
OPEN = ("/", "/health", "/ping", "/version", "/metrics", "/v2/health/live", "/v2/health/ready",
        "/v2/models/tiny/ready", "/docs", "/openapi.json")  # fmt: skip
CLOSED = ("/v1/models", "/openai/v1/models", "/v1/models/tiny", "/load", "/v2", "/v2/models",
          "/v2/models/tiny", "/v1/nope", "/nope", "/health/x", "/docs/x")  # fmt: skip
SERIES = re.compile(r'^vdiff_errors_total\{endpoint="(\w+)",model_name="tiny",type="(\w+)"\} (.+)$')


def start(checkpoint: str, *arguments: str) -> ServerProcess:
    common = (*COMMON, "--model_dir", checkpoint, "--model_name", "tiny")
    return ServerProcess(*common, *arguments, "--max_model_len", "256")


@pytest.fixture(scope="module")
def guarded(checkpoint: str) -> Iterator[ServerProcess]:
    """Has keys, from the environment, and everything else but a rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VDIFF_API_KEY", ", ".join(KEYS))
        process = start(
            checkpoint, "--max_body_bytes", str(MAX_BODY), "--allowed_origins", ORIGIN,
            "--enable_docs_url", "true", "--enable_repository_control",
        )  # fmt: skip
    with process:
        yield process.wait_until_ready()


@pytest.fixture(scope="module")
def limited(checkpoint: str) -> Iterator[ServerProcess]:
    """Lets each key and each address ask three times a day."""
    arguments = ("--rate_limit", "3/day", "1000/second", "--enable_grpc", "false")
    with start(checkpoint, "--api_key", *KEYS, *arguments) as process:
        yield process.wait_until_ready()


@pytest.fixture
def http(guarded: ServerProcess) -> Iterator[httpx.Client]:
    """One keep-alive connection, without a key."""
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=guarded.url, timeout=60, limits=limits) as client:
        yield client


@pytest.fixture
def rpc(guarded: ServerProcess) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{guarded.grpc_port}") as channel:
        yield GRPCInferenceServiceStub(channel)


def refusals(http: httpx.Client) -> dict[tuple[str, str], float]:
    """What `vdiff_errors_total` has counted, by endpoint and type."""
    found = map(SERIES.match, http.get("/metrics").text.splitlines())
    counts = {(m[1], m[2]): float(m[3]) for m in found if m}
    assert counts
    return {series: count for series, count in counts.items() if count}


def added(http: httpx.Client, before: dict[tuple[str, str], float]) -> dict[Any, float]:
    after = refusals(http)
    return {k: after[k] - before.get(k, 0) for k in after if after[k] != before.get(k, 0)}


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_let_in(guarded: ServerProcess, key: str) -> None:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="tiny", **PROMPT).choices
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_wrong_key_is_an_authentication_error(guarded: ServerProcess) -> None:
    with (
        OpenAI(base_url=f"{guarded.url}/v1", api_key=WRONG, max_retries=0) as client,
        pytest.raises(AuthenticationError) as caught,
    ):
        client.completions.create(model="tiny", **PROMPT)
    assert caught.value.type == "AuthenticationError"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]}x",
     f"Bearer {KEYS[0][:-1]}", f"Bearer {KEYS[0]} {KEYS[1]}", "Bearer \xff"],
)  # fmt: skip
def test_whatever_is_no_key_is_refused(http: httpx.Client, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    error = error_of(http.post("/v1/completions", json=PROMPT, headers=headers), 401)
    assert error["type"] == "AuthenticationError"
    assert "sk-" not in error["message"]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "The request has no API key."),
        ("Bearer", "The request has no API key."),
        (KEYS[0], "The Authorization header does not begin with Bearer."),
        (f"Bearer {KEYS[0]}x", "The API key of the request is not one of this server's."),
    ],
)
def test_a_missing_key_and_a_wrong_one_are_told_apart(
    http: httpx.Client, header: str | None, said: str
) -> None:
    headers = {} if header is None else {"Authorization": header}
    error = error_of(http.get("/v1/models", headers=headers), 401)
    assert error["message"].startswith(f"{said} This server needs an API key")


def test_the_command_to_try_has_a_place_for_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    announce(ServerConfig(api_key=("sk-1",)), "http://here")
    told = capsys.readouterr().out
    assert "-H 'Authorization: Bearer YOUR_API_KEY'" in told
    assert "sk-1" not in told
    announce(ServerConfig(), "http://here")
    assert "Authorization" not in capsys.readouterr().out


def test_the_scheme_may_be_spelled_small(http: httpx.Client) -> None:
    headers = {"Authorization": f"bearer  {KEYS[1]}"}
    assert http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_pages_need_no_key(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
def test_all_else_needs_one(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 401
    assert http.get(path, headers=BEARER).status_code != 401


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/openai/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
     "/v1/models/tiny:predict", "/v2/models/tiny/infer", "/v2/repository/models/tiny/unload"],
)  # fmt: skip
def test_a_request_without_a_key_is_not_even_read(http: httpx.Client, path: str) -> None:
    response = http.post(path, content=b"{")
    assert response.status_code == 401
    told = response.json()["error"]
    assert "Authorization: Bearer" in (told if path.startswith("/v2") else str(told))


def test_the_page_of_the_routes_is_there_by_its_flag_only(
    http: httpx.Client, server: ServerProcess
) -> None:
    page = http.get("/docs")
    assert "swagger" in page.text
    assert "/openapi.json" in page.text
    assert httpx.get(f"{server.url}/docs").status_code == 404


def infer() -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(bytes_contents=[b"x"])
    prompt = pb.ModelInferRequest.InferInputTensor(
        name="p", datatype="BYTES", shape=[1], contents=contents
    )
    parameters = {"max_tokens": pb.InferParameter(int64_param=2)}
    return pb.ModelInferRequest(model_name="tiny", inputs=[prompt], parameters=parameters)


def test_grpc_wants_the_key_too(rpc: GRPCInferenceServiceStub, http: httpx.Client) -> None:
    before = refusals(http)
    for metadata in ((), [("authorization", f"Bearer {WRONG}")]):
        with pytest.raises(grpc.RpcError) as caught:
            rpc.ModelInfer(infer(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert added(http, before) == {("v2", "unauthorized"): 2}
    answer = rpc.ModelInfer(infer(), metadata=[("authorization", f"Bearer {KEYS[1]}")])
    assert answer.outputs
    with pytest.raises(grpc.RpcError) as caught:
        rpc.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="tiny"))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert rpc.ServerLive(pb.ServerLiveRequest()).live
    assert rpc.ServerReady(pb.ServerReadyRequest()).ready
    assert rpc.ModelReady(pb.ModelReadyRequest(name="tiny")).ready


def in_chunks(size: int) -> Iterator[bytes]:
    """A body without a declared length."""
    yield b'{"prompt": "'
    for _ in range(size // 1000):
        yield b"x" * 1000
    yield b'"}'


def port_of(response: httpx.Response) -> int:
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]


@pytest.mark.parametrize("size", [MAX_BODY + 1000, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_and_the_connection_goes_on(
    http: httpx.Client, size: int, chunked: bool
) -> None:
    headers = BEARER | {"Content-Type": "application/json"}
    before = refusals(http)
    content = in_chunks(size) if chunked else b"".join(in_chunks(size))
    response = http.post("/v1/completions", content=content, headers=headers)
    error = error_of(response, 413)
    assert str(MAX_BODY) in error["message"]
    after = http.post("/v1/completions", json=PROMPT, headers=BEARER)
    assert after.status_code == 200
    assert port_of(after) == port_of(response)
    assert added(http, before) == {("completion", "too_large"): 1}


def test_a_body_that_just_fits_is_read(http: httpx.Client) -> None:
    body = json.dumps(PROMPT)
    for length, status in ((MAX_BODY, 200), (MAX_BODY + 1, 413)):
        headers = BEARER | {"Content-Type": "application/json"}
        content = body + " " * (length - len(body))
        for each in (content.encode(), (c.encode() for c in (content[:9], content[9:]))):
            assert http.post("/v1/completions", content=each, headers=headers).status_code == status


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: ",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    ],
)
def test_a_head_without_end_ends_the_connection(
    guarded: ServerProcess, http: httpx.Client, beginning: bytes
) -> None:
    url = httpx.URL(guarded.url)
    with socket.create_connection((url.host, url.port), timeout=60) as stranger:
        stranger.sendall(beginning)
        with pytest.raises(ConnectionError):
            stranger.sendall(b"a" * 2**25)
    assert http.get("/health", headers={"X": "a" * 2**14}).status_code == 200


def test_kserves_routes_have_the_same_limit_in_their_own_shape(http: httpx.Client) -> None:
    for path in ("/v1/models/tiny:predict", "/v2/models/tiny/infer"):
        response = http.post(path, content=b" " * (MAX_BODY + 1), headers=BEARER)
        assert response.status_code == 413
        assert isinstance(response.json()["error"], str)


def test_refusals_before_the_service_are_counted_once(http: httpx.Client) -> None:
    before = refusals(http)
    as_json = BEARER | {"Content-Type": "application/json"}
    for path, body in (
        ("/v1/completions", b"{"),
        ("/v1/completions", b'{"prompt": 3}'),
        ("/v1/completions", b'{"prompt": "x", "model": "nope"}'),
        ("/v1/completions", b'{"prompt": "x", "temperature": 9}'),
        ("/v1/chat/completions", b'{"messages": 3}'),
        ("/v1/models/tiny:predict", b"{"),
        ("/v1/models/tiny:predict", b'{"instances": []}'),
        ("/v1/models/tiny:predict", b'{"instances": [""]}'),
        ("/v1/models/nope:predict", b"{}"),
        ("/v2/models/tiny/infer", b'{"inputs": []}'),
        ("/v2/models/nope/infer", b'{"inputs": []}'),
    ):
        assert http.post(path, content=body, headers=as_json).status_code in (400, 404), path
    http.post("/v1/completions", content=b"x", headers=BEARER)
    http.post("/v1/chat/completions", json={})
    http.post("/tokenize", json={})
    http.get("/v1/chat/completions", headers=BEARER)
    http.post("/v1/nope", json={}, headers=BEARER)
    assert added(http, before) == {
        ("completion", "invalid_request"): 4,
        ("completion", "unknown_model"): 1,
        ("chat", "invalid_request"): 1,
        ("chat", "unauthorized"): 1,
        ("v1", "invalid_request"): 3,
        ("v1", "unknown_model"): 1,
        ("v2", "invalid_request"): 1,
        ("v2", "unknown_model"): 1,
    }


def test_a_page_of_an_allowed_origin_may_call_the_server(http: httpx.Client) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    answer = http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    for headers, status in ((BEARER, 200), ({}, 401)):
        response = http.get("/v1/models", headers={"Origin": ORIGIN} | headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]


def test_a_page_of_another_origin_may_not(http: httpx.Client, server: ServerProcess) -> None:
    headers = {"Origin": "https://evil.example.org"}
    for url in (http.base_url, httpx.URL(server.url)):
        response = httpx.get(url.join("/v1/models"), headers=BEARER | headers)
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers


def test_a_sender_who_asks_too_often_has_to_wait(limited: ServerProcess) -> None:
    with httpx.Client(base_url=limited.url, timeout=60) as http:
        before = refusals(http)
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}"}
            for _ in range(3):
                response = http.post("/v1/completions", json=PROMPT, headers=headers)
                assert response.status_code == 200
        with (
            OpenAI(base_url=f"{limited.url}/v1", api_key=KEYS[0], max_retries=0) as client,
            pytest.raises(RateLimitError, match="3 per 1 day") as caught,
        ):
            client.completions.create(model="tiny", **PROMPT)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 86400
        assert added(http, before) == {("completion", "rate_limited"): 1}
        assert all(http.get("/health").status_code == 200 for _ in range(9))


def test_guessing_keys_is_limited_by_address(limited: ServerProcess) -> None:
    def guess(i: int) -> int:
        headers = {"Authorization": f"Bearer {WRONG}-{i}"}
        return httpx.get(f"{limited.url}/v1/models", headers=headers).status_code

    assert [guess(i) for i in range(5)] == [401, 401, 401, 429, 429]


def test_the_repository_opens_by_its_flag(http: httpx.Client) -> None:
    def change(verb: str, name: str = "tiny") -> httpx.Response:
        return http.post(f"/v2/repository/models/{name}/{verb}", headers=BEARER)

    answers: list[httpx.Response] = []

    def ask() -> None:
        long = {"prompt": "x", "max_tokens": 120, "ignore_eos": True, "block_length": 120}
        url = http.base_url.join("/v1/completions")
        answers.append(httpx.post(url, json=long, headers=BEARER, timeout=60))

    assert change("unload", "nope").status_code == 404
    running = threading.Thread(target=ask)
    running.start()
    wait_until(lambda: http.get("/load", headers=BEARER).json() == {"server_load": 1})
    before = refusals(http)
    assert change("unload").status_code == 200
    running.join()
    assert answers[0].status_code == 200, "what ran was finished"
    assert http.get("/load", headers=BEARER).json() == {"server_load": 0}
    error = error_of(http.post("/v1/completions", json=PROMPT, headers=BEARER), 503)
    assert "not loaded" in error["message"]
    assert added(http, before) == {("completion", "unavailable"): 1}
    assert http.get("/health").status_code == 503
    assert http.get("/v2/health/live").status_code == 200
    assert http.post("/tokenize", json={"prompt": "x"}, headers=BEARER).status_code == 503
    assert change("unload").status_code == 503
    assert change("load").status_code == change("load").status_code == 200
    assert http.post("/v1/completions", json=PROMPT, headers=BEARER).status_code == 200
    assert http.get("/health").status_code == 200


def test_keys_are_never_written_down(guarded: ServerProcess, limited: ServerProcess) -> None:
    """The last test: the servers have seen right and wrong keys."""
    for server in (guarded, limited):
        headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-Id": "the-last-one"}
        httpx.post(f"{server.url}/v1/nope", headers=headers)
        server.wait_for_line("the-last-one")
        assert "sk-" not in server.output
        assert "sk-" not in httpx.get(f"{server.url}/metrics").text
