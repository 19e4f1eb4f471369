"""140 requests that a genuine vLLM answered: the same status, error and shape, or a written reason.

`INTENDED` lists what differs for good, `OFFERED` what only this server answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

RECORDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data/vllm/contract.json").read_text()
)
BY_NAME = {record["name"]: record for record in RECORDED}

INTENDED = {
    "g./v1/models/ref": "one model can be asked for, as OpenAI and KServe have it",
    "c.bestof": "best_of asks for an answer that this server does not choose: 400",
    "c.bs": "beam search does not exist for diffusion models: 400",
    "c.mixed": "the error names the whole field, body.prompt",
    "c.ctxexact": "a prompt that fills the context is told as such: param input_tokens",
    "404": "a route that does not exist is told in OpenAI's shape",
    "embed": "a route that does not exist is told in OpenAI's shape",
    "c.get": "a wrong method is told in OpenAI's shape",
    "c.plp": "a diffusion model does not predict its prompt: prompt_logprobs is refused",
    "h.plp": "the same",
}
"""Answers that differ from vLLM's on purpose."""

WHOLE_HERE = ("h.treq", "h.tnamed", "h.tsnamed")
"""Forced calls that `max_tokens` cut off in the recording, where they are text; here they are
always whole."""

KEYS_NOT_COMPARED = {
    "permission": "vLLM's list of made-up permissions of a model",
    "created_cache_tokens": "no prompt is cached",
    "prompt_logprobs": "is refused; what echo and logprobs tell of a prompt is in `logprobs`",
    "stop_reason": "depends on the text, which is the model's own",
}

OFFERED = ("c.suffix",)
"""Requests that vLLM refuses and this server answers."""

NO_ROUTE = ("msgs", "render", "inv", "batch")
"""Requests to routes that this server does not have."""

others = {*INTENDED, *OFFERED, *NO_ROUTE, *WHOLE_HERE}
alike = [r for r in RECORDED if r["name"] not in others]


def in_vocabulary(value: Any) -> Any:
    """The request with token ids that the small test vocabulary has."""
    if isinstance(value, list):
        return [in_vocabulary(each) for each in value]
    is_id = isinstance(value, int) and not isinstance(value, bool)
    return value % 300 if is_id and 320 <= value < 2048 else value


def send(http: httpx.Client, record: dict[str, Any]) -> httpx.Response:
    request = record["request"]
    if isinstance(request, dict) and "prompt" in request:
        request = request | {"prompt": in_vocabulary(request["prompt"])}
    body = {"content": request} if isinstance(request, str) else {"json": request}
    if request is None:
        body = {}
    headers = {k.title(): v for k, v in record["headers"].items()}
    if record["method"] == "POST" and not body:
        headers["Content-Type"] = "application/json"
    return http.request(record["method"], record["path"], headers=headers, **body)


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def assert_has_shape(ours: Any, theirs: Any, where: str = "") -> None:
    """Whatever vLLM's answer holds, ours holds too; what is null there may be absent."""
    if where.endswith(".top_logprobs[0]") and isinstance(theirs, dict):
        assert set(ours.values()) == set(theirs.values())  # keyed by the tokens' texts
    elif theirs == "list":
        assert isinstance(ours, list), where
    elif isinstance(theirs, dict):
        for key, expected in theirs.items():
            if expected != "NoneType" and key not in KEYS_NOT_COMPARED:
                assert key in ours, f"{where}.{key} is missing"
                assert_has_shape(ours[key], expected, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert isinstance(ours, list), where
        if theirs and ours:
            assert_has_shape(ours[0], theirs[0], f"{where}[0]")
    elif theirs != "NoneType":
        assert ours == theirs, where


def assert_same_error(response: httpx.Response, expected: dict[str, Any]) -> None:
    error = response.json()["error"]
    assert error["code"] == expected["code"]
    assert error["type"] == expected["type"]
    if expected["param"] is not None:
        assert error["param"] == expected["param"]


@pytest.mark.parametrize("record", alike, ids=[r["name"] for r in alike])
def test_the_answer_is_like_vllms(http: httpx.Client, record: dict[str, Any]) -> None:
    response = send(http, record)
    assert response.status_code == record["status"], response.text
    if "error" in record:
        assert_same_error(response, record["error"])
    elif "shape" in record:
        assert_has_shape(shape(response.json()), record["shape"])
    elif "stream" in record:
        assert_same_stream(response, record["stream"])


def assert_same_stream(response: httpx.Response, expected: dict[str, Any]) -> None:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert_has_shape(shape(chunks[-1]), expected["last"])
    first = expected["first"]
    assert_has_shape(shape(chunks[0]), first)


@pytest.mark.parametrize("name", ["404", "embed", "c.get"])
def test_what_is_not_there_has_vllms_status_and_an_error_object(
    http: httpx.Client, name: str
) -> None:
    response = send(http, BY_NAME[name])
    assert response.status_code == BY_NAME[name]["status"]
    assert response.json()["error"]["code"] == response.status_code


@pytest.mark.parametrize(
    "name", [n for n in INTENDED if n not in ("g./v1/models/ref", "404", "embed", "c.get")]
)
def test_intended_differences_are_refusals_too(http: httpx.Client, name: str) -> None:
    assert send(http, BY_NAME[name]).status_code == 400


@pytest.mark.parametrize("name", WHOLE_HERE)
def test_forced_calls_are_whole(http: httpx.Client, name: str) -> None:
    response = send(http, BY_NAME[name])
    assert response.status_code == BY_NAME[name]["status"], response.text
    if name == "h.tsnamed":
        lines = [line for line in response.text.splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert_has_shape(shape(chunks[0]), BY_NAME[name]["stream"]["first"])
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        parts = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert (parts[0]["type"], parts[0]["function"]["name"]) == ("function", "f")
        assert all(part.keys() == {"index", "function"} for part in parts[1:])
        arguments = "".join(part["function"]["arguments"] for part in parts)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        call = choice["message"]["tool_calls"][0]
        assert (call["type"], call["function"]["name"]) == ("function", "f")
        arguments, reason = call["function"]["arguments"], choice["finish_reason"]
    assert isinstance(json.loads(arguments)["x"], int)
    assert reason == "tool_calls"


@pytest.mark.parametrize("name", NO_ROUTE)
def test_routes_that_are_not_there_are_404(http: httpx.Client, name: str) -> None:
    assert send(http, BY_NAME[name]).status_code in (404, 405)


@pytest.mark.parametrize("name", OFFERED)
def test_what_vllm_refuses_and_this_server_offers_is_answered(
    http: httpx.Client, name: str
) -> None:
    assert BY_NAME[name]["status"] == 400
    assert send(http, BY_NAME[name]).status_code == 200


def test_every_recorded_request_is_replayed() -> None:
    assert len(RECORDED) == 140
    assert len(alike) + len(others) == 140
