"""What an operator reads: the lines of a server's log."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.certificate import write_certificate
from tests.server.conftest import COMMON
from tests.server.process import LISTENING, ServerProcess

COMPLETIONS = "/v1/completions"
PROMPT = {"prompt": "x", "max_tokens": 2}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def logged(checkpoint: str) -> Iterator[ServerProcess]:
    """A server with an access log in a format of its own."""
    line = 'access %(r)s %(s)s "%({X-Request-Id}o)s" %({User-Agent}i)s'
    options = ("--access_log_format", line, "--api_key", "secret", "--enable_grpc", "false")
    with ServerProcess(*COMMON, "--model_dir", checkpoint, *options) as process:
        yield process.wait_until_ready()


TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


def access_lines(process: ServerProcess) -> list[str]:
    return [line for line in process.lines if line.startswith("access ")]


def test_each_request_has_one_line_in_the_access_log(logged: ServerProcess) -> None:
    before = len(logged.lines)
    with httpx.Client(base_url=logged.url, headers={"User-Agent": "me"}) as http:
        http.post(COMPLETIONS, json=PROMPT, headers=KEY | {"X-Request-Id": "let-in"})
        http.post(COMPLETIONS, json=PROMPT, headers={"X-Request-Id": "kept-out"})
    logged.wait_for_line("access .*kept-out")
    told = [line.strip() for line in logged.lines[before:] if COMPLETIONS in line]
    assert told == [
        f'access POST {COMPLETIONS} HTTP/1.1 200 "let-in" me',
        f'access POST {COMPLETIONS} HTTP/1.1 401 "kept-out" me',
    ]


def test_a_refusal_names_the_field_and_nothing_of_its_content(logged: ServerProcess) -> None:
    body = PROMPT | {"logit_bias": {"private": "x"}}
    headers = KEY | {"X-Request-Id": "biased"}
    httpx.post(f"{logged.url}{COMPLETIONS}", json=body, headers=headers)
    line = logged.wait_for_line("completion biased")
    assert line.endswith("completion biased 400: refused, Bad Request, logit_bias")
    assert "private" not in logged.output


def test_the_access_log_tells_of_a_client_that_left(logged: ServerProcess) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True}).encode()
    url = httpx.URL(logged.url)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(head.encode() + body)
    assert re.fullmatch(
        rf'access POST {COMPLETIONS} HTTP/1.1 499 "-" -', logged.wait_for_line(" 499 ")
    )
    assert "Traceback" not in logged.output


def test_the_access_log_leaves_probes_out_and_keeps_to_its_lines(logged: ServerProcess) -> None:
    with httpx.Client(base_url=logged.url, headers=KEY) as http:
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
        http.get("/nope%0Aaccess%1B[31m%E2%80%A8forged")
    assert "/nope_access_[31m_forged HTTP/1.1 404" in logged.wait_for_line("access .*forged")
    assert not [line for line in access_lines(logged) if re.search("health|metrics", line)]
    assert not [line for line in logged.lines if "kserve.trace" in line]


def test_a_request_of_a_trace_names_it(logged: ServerProcess) -> None:
    headers = KEY | TRACEPARENT | {"X-Request-Id": "traced"}
    httpx.post(f"{logged.url}{COMPLETIONS}", json=PROMPT, headers=headers)
    assert logged.wait_for_line("completion traced").endswith(f" trace_id={TRACE}")
    httpx.post(f"{logged.url}{COMPLETIONS}", json=PROMPT, headers=KEY | {"X-Request-Id": "alone"})
    assert "trace_id" not in logged.wait_for_line("completion alone")


def test_every_line_of_a_json_log_is_an_object(checkpoint: str) -> None:
    options = ("--log_format", "json", "--model_dir", checkpoint, "--enable_grpc", "false")
    with ServerProcess(*COMMON, *options) as process:
        url = process.wait_for(re.compile(r' is ready at (http[^"]+)"'))[1]
        headers = TRACEPARENT | {"X-Request-Id": "whole"}
        httpx.post(f"{url}{COMPLETIONS}", json=PROMPT | {"ignore_eos": True}, headers=headers)
        httpx.post(f"{url}{COMPLETIONS}", json={"prompt": 3}, headers={"X-Request-Id": "bad"})
        httpx.get(f"{url}/health")
        process.terminate()
        assert process.wait() == 0
        with pytest.raises(EOFError):
            process.wait_for_line("no such line")
    bars = re.compile(r"Loading|\s*$")
    lines = [json.loads(line) for line in process.lines if not bars.match(line)]
    told = {line["request_id"]: line for line in lines if "request_id" in line}
    assert {**told["whole"], "endpoint": "completion", "status": 200, "trace_id": TRACE} == told[
        "whole"
    ]
    assert told["whole"]["completion_tokens"] == 2
    assert told["whole"]["finish_reasons"] == ["length"]
    assert told["whole"]["forwards"] >= 1
    assert (told["bad"]["status"], told["bad"]["field"]) == (400, "prompt")
    assert "trace_id" not in told["bad"]
    access = [
        (line["path"], line["status"]) for line in lines if line["logger"] == "uvicorn.access"
    ]
    assert access == [(COMPLETIONS, 200), (COMPLETIONS, 400)]


def test_logging_can_be_left_to_others(tmp_path: Path) -> None:
    """KServe would tell of its port before the certificate is found not to be one."""
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).touch()
    process = ServerProcess(
        *("--port", "8080", "--configure_logging", "false"),
        *("--ssl_certfile", f"{tmp_path}/tls.crt", "--ssl_keyfile", f"{tmp_path}/tls.key"),
    )
    assert process.wait() == 1
    process.wait_for_line("error: --ssl_certfile")
    assert "INFO" not in process.output


def test_the_port_of_https_is_the_one_that_is_tried_first(checkpoint: str, tmp_path: Path) -> None:
    """8443 where none is chosen: another program may have 8080."""
    host = "127.0.0.77"  # nobody else's
    certificate = write_certificate(tmp_path / "tls")
    options = (
        "--model_dir",
        checkpoint,
        "--host",
        host,
        "--port",
        "8080",
        "--enable_grpc",
        "false",
    )
    tls = ("--ssl_certfile", str(certificate), "--ssl_keyfile", str(tmp_path / "tls/tls.key"))
    with socket.create_server((host, 8080)), ServerProcess(*COMMON, *options, *tls) as process:
        assert process.wait_for(LISTENING).groups() == (host, "8443")
    assert "INFO kserve: SSL enabled, switching listen port to 8443" in process.output
