"""Start, stop, clients that leave, a full queue: the server over time."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import httpx
import pytest
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.server.conftest import COMMON
from tests.server.process import ServerProcess, free_port
from tests.waiting import wait_until
from vdiff_kserve.checkpoint import check_readable
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.ports import ServerError, check_ports
from vdiff_kserve.server import allow_connections

NOBODY = 65534

LONG = {"prompt": "the tale", "max_tokens": 240, "ignore_eos": True, "block_length": 240}
"""A request of 240 forward passes: seconds, where an aborted one is gone at once."""


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("kind", ["whole", "stream", "v1", "v2", "grpc"])
def test_a_client_that_leaves_stops_costing(
    server: ServerProcess, http: httpx.Client, kind: str
) -> None:
    aborted = 'vdiff_answers_total{finish_reason="abort"'
    before = metric(http, aborted)
    parameters = LONG | {"n": 2, "temperature": 1.0}
    if kind == "grpc":
        leave_grpc(server, http, parameters)
    else:
        leave_http(server, http, kind, parameters)
    wait_until(lambda: metric(http, "vdiff_requests_running") == 0)
    wait_until(lambda: metric(http, aborted) == before + 2)
    endpoint = {"whole": "completion", "stream": "completion", "grpc": "v2"}.get(kind, kind)
    closed = f'vdiff_errors_total{{endpoint="{endpoint}",model_name="tiny",type="client_closed"}}'
    assert metric(http, closed) >= 1


def leave_http(
    server: ServerProcess, http: httpx.Client, kind: str, parameters: dict[str, Any]
) -> None:
    path, fields = {
        "whole": ("/v1/completions", parameters),
        "stream": ("/v1/completions", parameters | {"stream": True}),
        "v1": ("/v1/models/tiny:predict", {"instances": [parameters]}),
        "v2": (
            "/v2/models/tiny/infer",
            {
                "inputs": [{"name": "p", "datatype": "BYTES", "shape": [1], "data": ["x"]}],
                "parameters": {k: v for k, v in parameters.items() if k != "prompt"},
            },
        ),
    }[kind]
    body = json.dumps(fields)
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_until(lambda: metric(http, "vdiff_requests_running") == 2)
        if kind == "stream":
            assert connection.recv(5) == b"HTTP/"


def leave_grpc(server: ServerProcess, http: httpx.Client, parameters: dict[str, Any]) -> None:
    prompt = InferInput("prompt", [1], "BYTES", data=["x"])
    given = {k: v for k, v in parameters.items() if k != "prompt"} | {"temperature": "1"}
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = GRPCInferenceServiceStub(channel).ModelInfer.future(
            InferRequest("tiny", [prompt], parameters=given).to_grpc()
        )
        wait_until(lambda: metric(http, "vdiff_requests_running") == 2)
        call.cancel()


def test_a_full_queue_says_when_to_try_again(server: ServerProcess, http: httpx.Client) -> None:
    """Four run and sixteen wait; the next is refused at once, the others are answered."""
    many = LONG | {"n": 20, "temperature": 1.0, "max_tokens": 60}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{server.url}/v1/completions", json=many, timeout=120)
        wait_until(lambda: metric(http, "vdiff_requests_waiting") > 0)
        for body in ({"prompt": ["x"] * 16}, {"prompt": ["x"] * 16, "stream": True}):
            refused = http.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == 429
        refused = http.post("/v1/models/tiny:predict", json={"instances": ["x"] * 16})
        assert refused.status_code == 429
        assert isinstance(refused.json()["error"], str)
        assert len(running.result().json()["choices"]) == 20


def test_metrics_count_what_was_answered(http: httpx.Client) -> None:
    names = ("vdiff_prompt_tokens_total", "vdiff_generation_tokens_total", "vdiff_forwards_total")

    def counts() -> list[float]:
        return [metric(http, name) for name in names]

    before = counts()
    http.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 6, "ignore_eos": True})
    # The engine counts a round after it has sent what the round made final.
    wait_until(lambda: counts() == [before[0] + 3, before[1] + 6, before[2] + 6])
    openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = http.get("/metrics", headers=openmetrics)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_server_routes(http: httpx.Client) -> None:
    assert http.get("/health").content == b""
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/version").json().keys() == {"version"}
    assert http.get("/").json() == {"status": "alive"}
    assert http.post("/health").status_code == 405


def test_the_openapi_document_has_the_refusals(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for prefix in ("/v1", "/openai/v1"):
        for path in ("chat/completions", "completions"):
            responses = paths[f"{prefix}/{path}"]["post"]["responses"]
            assert {"200", "400", "404", "429", "500", "503"} <= responses.keys()


def test_probes_are_not_logged(server: ServerProcess, http: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/v2/health/live", "/v2/models/tiny/ready", "/ping"):
        assert http.get(path).status_code == 200
    assert http.get("/version").status_code == 200
    wait_until(lambda: "/version" in server.output)
    assert not [line for line in server.lines if '"GET /health' in line and " 200" in line]
    assert not [line for line in server.lines if '"GET /metrics' in line]


@pytest.fixture(scope="module")
def to_stop(checkpoint: str) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that start together, for a test each: the second ends without a grace period."""
    arguments = (*COMMON, "--model_dir", checkpoint)
    with (
        ServerProcess(*arguments) as patient,
        ServerProcess(*arguments, "--grace_period", "0") as impatient,
    ):
        yield patient.wait_until_ready(), impatient.wait_until_ready()


def test_sigterm_finishes_what_runs_and_refuses_what_comes(
    to_stop: tuple[ServerProcess, ServerProcess],
) -> None:
    server, _ = to_stop
    with (
        httpx.Client(base_url=server.url, timeout=120) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        started = threading.Event()
        body = LONG | {"block_length": 8, "stream": True}

        def read() -> list[str]:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as r:
                lines = []
                for line in r.iter_lines():
                    lines.append(line)
                    started.set()
                return lines

        running: Future[list[str]] = pool.submit(read)
        assert http.get("/health").status_code == 200
        assert started.wait(60)
        server.terminate()
        wait_until(lambda: http.get("/health").status_code == 503)
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert "stopping" in refused.json()["error"]["message"]
        assert http.get("/v2/models/llada/ready").status_code == 503
        assert http.get("/v2/health/ready").status_code == 503
        predict = http.post("/v1/models/llada:predict", json={"instances": ["x"]})
        assert predict.status_code == 503
        lines = [line for line in running.result(120) if line]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "Stopping; running requests (1) may go on for" in server.output
        assert "A second signal (Ctrl-C) ends them at once." in server.output


def test_what_outlasts_the_grace_period_is_told(
    to_stop: tuple[ServerProcess, ServerProcess],
) -> None:
    _, server = to_stop
    with (
        ThreadPoolExecutor(2) as pool,
        httpx.Client(base_url=server.url) as http,
    ):
        url = f"{server.url}/v1/completions"
        body = LONG | {"max_tokens": 3000, "block_length": 8}
        whole = pool.submit(httpx.post, url, json=body, timeout=120)
        streamed = pool.submit(httpx.post, url, json=body | {"stream": True}, timeout=120)
        wait_until(lambda: metric(http, "vdiff_requests_running") == 2)
        wait_until(lambda: metric(http, "vdiff_time_to_first_text_seconds_count") == 2)
        server.terminate()
        assert whole.result().status_code == 503
        *_, error, done = [line for line in streamed.result().text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
        assert done == "data: [DONE]"
        assert server.wait() == 0


START = ("Registering model", "Starting uvicorn", "Listening on")


def test_a_signal_during_the_start_ends_it_quietly(checkpoint: str) -> None:
    arguments = (*COMMON, "--model_dir", checkpoint)
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess(*arguments)) for _ in START]
        for server, line, number in zip(
            servers, START, (signal.SIGINT, signal.SIGINT, signal.SIGTERM), strict=True
        ):
            server.wait_for_line(line)
            server.process.send_signal(number)
        for server in servers:
            assert server.wait() == 0, server.output
            for word in ("Traceback", "never awaited", "rror:"):
                assert word not in server.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_anything_is_imported_is_heeded_too(number: signal.Signals) -> None:
    with ServerProcess(*COMMON) as server:
        status = Path(f"/proc/{server.process.pid}/status")

        def handled() -> bool:
            caught = re.search(r"SigCgt:\t(\w+)", status.read_text(encoding="utf-8"))
            return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

        wait_until(handled)
        server.process.send_signal(number)
        assert server.wait() == 0
    assert server.output == ""


def test_addresses_that_cannot_be_listened_on_are_one_error(
    checkpoint: str, server: ServerProcess
) -> None:
    arguments = (*COMMON, "--model_dir", checkpoint)
    port = server.url.rpartition(":")[2]
    taken = ("--port", port, "--grpc_port", str(server.grpc_port))
    with (
        ServerProcess(*arguments, *taken) as second,
        ServerProcess(*arguments, "--host", "192.0.2.1") as third,
    ):
        assert second.wait() == 1
        assert second.output.endswith(
            f"error: cannot listen on 127.0.0.1 port {port}: address already in use; choose "
            "another address by --host and --port. gRPC cannot listen on 127.0.0.1 port "
            f"{server.grpc_port}: address already in use; choose another by --grpc_port, or switch "
            "gRPC off by --enable_grpc false\n"
        )
        for said in ("add_port", "GRPC_VERBOSITY", "Traceback"):
            assert said not in second.output
        assert third.wait() == 1
        assert "error: cannot listen on 192.0.2.1 port " in third.output


def test_only_the_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken = owner.getsockname()[1]
        with pytest.raises(ServerError, match=f"^cannot listen on 127.0.0.1 port {taken}: [^.]*$"):
            check_ports("127.0.0.1", taken, free_port())
        with pytest.raises(ServerError, match=f"^gRPC cannot listen on 127.0.0.1 port {taken}: "):
            check_ports("127.0.0.1", 0, taken)
        with pytest.raises(ServerError, match=r"no\.such\.host\.invalid port 0: "):
            check_ports("no.such.host.invalid", 0, None)
    check_ports("127.0.0.1", taken, None)


def test_every_address_is_of_both_kinds(checkpoint: str) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with ServerProcess(*COMMON, "--model_dir", checkpoint, "--host", "::") as server:
        server.wait_until_ready()
        assert server.url.startswith("http://[::1]:")
        port = server.url.rpartition(":")[2]
        for host in ("[::1]", "127.0.0.1"):
            assert httpx.get(f"http://{host}:{port}/health").status_code == 200
        with ServerProcess(
            *COMMON, "--model_dir", checkpoint, "--host", "::", "--port", port
        ) as second:
            assert second.wait() == 1
            assert f"error: cannot listen on :: port {port}: " in second.output


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_connections(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
        allow_connections(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_a_file_that_the_user_may_not_read_is_named(checkpoint: str, name: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        copy = Path(shutil.copytree(checkpoint, Path(folder) / "model"))
        (copy / name).chmod(0)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(CheckpointError) as refusal:
                check_readable(copy)
        finally:
            os.seteuid(0)
    message = str(refusal.value)
    assert message.startswith(f"{copy / name} cannot be read by user {NOBODY} of group ")
    assert message.endswith("Permission denied")
