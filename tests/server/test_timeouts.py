"""Deadlines and priorities of requests, on a real server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.server.process import ServerProcess
from tests.waiting import post_until_it_runs

LONG: dict[str, Any] = {"prompt": "ten tin", "max_tokens": 200, "ignore_eos": True, "seed": 1}
ALL_PLACES = {"n": 4, "temperature": 1.0}
"""As many answers as the server has places for."""


def running(http: httpx.Client) -> float:
    text = http.get("/metrics").text
    found = re.search(r"^vdiff_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_request_whose_time_is_over_while_it_runs_gets_504(
    server: ServerProcess, http: httpx.Client
) -> None:
    response = post_until_it_runs(f"{server.url}/v1/completions", LONG)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("TimeoutError", "timeout", 504)
    assert "before its answer was complete" in error["message"]
    assert running(http) == 0
    assert http.post("/v1/completions", json=LONG | {"max_tokens": 4}).status_code == 200


def test_stream_whose_time_is_over_ends_with_an_error_object(http: httpx.Client) -> None:
    body = LONG | {"timeout": 0.2, "stream": True, "block_length": 8}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert error["code"] == 504


def test_request_whose_time_is_over_in_the_queue_gets_503(
    server: ServerProcess, http: httpx.Client
) -> None:
    url, body = f"{server.url}/v1/completions", LONG | ALL_PLACES | {"stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)
        late = http.post("/v1/completions", json=LONG | {"timeout": 0.05})
        assert late.status_code == 503
        assert "before it got a place" in late.json()["error"]["message"]
        assert "Retry-After" in late.headers
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.parametrize("timeout", [0, -1])
def test_timeout_that_is_no_time_is_refused(http: httpx.Client, timeout: float) -> None:
    response = http.post("/v1/completions", json=LONG | {"timeout": timeout})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout"
    assert "above 0" in response.json()["error"]["message"]


def test_priority_that_is_no_integer_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=LONG | {"priority": "high"})
    assert response.status_code == 400
    assert response.json()["error"]["param"].endswith("priority")
