"""What clients are told when something is wrong, and that the connection survives it."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}

WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("temperature", -1, "from 0 to 2"),
    ("temperature", 2.5, "from 0 to 2"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.5, "above 0 and at most 1"),
    ("n", 0, "[1, 20]"),
    ("n", 21, "[1, 20]"),
    ("steps", 0, "at least 1"),
    ("block_length", 0, "at least 1"),
    ("cfg_scale", -0.1, "from 0 to 100"),
    ("threshold", 0, "above 0 and at most 1"),
    ("threshold", 1.1, "above 0 and at most 1"),
    ("max_tokens", 0, "[1, 256]"),
    ("max_tokens", -1, "[1, 256]"),
    ("max_tokens", 257, "[1, 256]"),
    ("stop", "", "empty"),
    ("stop", ["a", ""], "empty"),
    ("stop_token_ids", [320], "[0, 319]"),
    ("stream_options", {"include_usage": True}, "stream is true"),
    ("top_k", -2, "at least -1"),
]
WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("temperature", "warm", "valid number"),
    ("max_tokens", 1.5, "valid integer"),
    ("remasking", "best", "'low_confidence' or 'random'"),
    ("seed", 2**64, "9223372036854775807"),
    ("stop", 5, "stop: Input should be a text or a list of texts"),
    ("logit_bias", [3], "logit_bias: Input should be an object"),
    ("radius", 2**70, "2147483647"),
    ("max_tokens", 2**70, "2147483647"),
    ("stream", "perhaps", "valid boolean"),
    ("n", [], "valid integer"),
]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG_VALUES)
def test_a_value_out_of_range_is_told_with_the_range(
    http: httpx.Client, field: str, value: Any, allowed: str
) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": "x", field: value}), 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] == field
    assert field in error["message"]
    assert allowed in error["message"]


@pytest.mark.parametrize(("field", "value", "expected"), WRONG_TYPES)
def test_a_wrong_type_is_told_with_the_field(
    http: httpx.Client, field: str, value: Any, expected: str
) -> None:
    error = error_of(http.post(CHAT, json=HI | {field: value}), 400)
    assert error["type"] == "Bad Request"
    assert error["param"] == f"body.{field}"
    assert field in error["message"]
    assert expected in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "body.messages"),
        (CHAT, {}, "body.messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"content": "hi"}]}, "body.messages.0.role"),
        (RESPONSES, {"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        (
            "/v1/responses",
            {"input": "hi", "text": {"format": {"type": "json_schema"}}},
            "body.text",
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        ("/tokenize", HI | {"logprobs": "x"}, "body.logprobs"),
        (CHAT, {"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        (CHAT, HI | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]},
            "messages.0.content",
        ),
        (CHAT, HI | {"continue_final_message": True}, "messages"),
        (CHAT, HI | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, HI | {"n": 2, "temperature": 0}, "n"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETIONS, {"prompt": [320]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "body.prompt"),
        (COMPLETIONS, {"prompt": ["a", [1]]}, "body.prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 11, "n": 2}, "prompt"),
    ],
)
def test_what_cannot_be_answered_names_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    error = error_of(http.post(path, json=body), 400)
    assert error["param"].startswith(param)


@pytest.mark.parametrize("prompt", [5, [-1], ["a", 5], {"a": 1}, [[1], "a"]])
def test_all_forms_of_a_prompt_are_told_at_once(http: httpx.Client, prompt: Any) -> None:
    message = error_of(http.post(COMPLETIONS, json={"prompt": prompt}), 400)["message"]
    assert message.count("body.prompt") == 1
    assert "a list of token ids from 0 on" in message


def test_a_template_variable_cannot_take_the_place_of_the_messages(http: httpx.Client) -> None:
    error = error_of(http.post(CHAT, json=HI | {"chat_template_kwargs": {"messages": []}}), 400)
    assert error["message"] == "chat_template_kwargs cannot set messages."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str, stream: bool) -> None:
    error = error_of(
        http.post(path, json=HI | {"prompt": "x", "model": "nope", "stream": stream}), 404
    )
    assert error["type"] == "NotFoundError"
    assert error["param"] == "model"
    assert "`nope`" in error["message"]
    assert "tiny, ref" in error["message"]


def test_an_unknown_model_is_not_found_in_the_list(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/models/nope"), 404)["param"] == "model"
    assert error_of(http.get("/openai/v1/models/some/nope"), 404)["param"] == "model"


def test_the_list_of_models_may_be_asked_for_with_a_slash(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json()["models"] == http.get("/v1/models").json()["models"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_told_with_both_lengths(
    http: httpx.Client, stream: bool
) -> None:
    body = {"prompt": [65] * 300, "stream": stream}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == "input_tokens"
    assert error["message"].startswith("This model's maximum context length is 256 tokens.")
    assert "300" in error["message"]
    error_of(http.post(COMPLETIONS, json={"prompt": [65] * 256}), 400)
    assert http.post(COMPLETIONS, json={"prompt": [65] * 255}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"\xff", b"3", b'{"prompt": NaN}', b"[" * 100_000]
)
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes) -> None:
    error = error_of(http.post(COMPLETIONS, content=body, headers=JSON), 400)
    assert error["param"].startswith("body")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"prompt": "x",}', "line 1, column 16"),
        (b'{\n  "prompt": "\xc3\xa9",\n  "max_tokens" 5\n}', "line 3, column 16"),
        (b"{", "line 1, column 2"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_a_body_that_is_not_json_is_told_where(
    http: httpx.Client, path: str, body: bytes, place: str
) -> None:
    error = error_of(http.post(path, content=body, headers=JSON), 400)
    assert (error["type"], error["param"]) == ("Bad Request", "body")
    assert error["message"].endswith(place)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "threshold", "cfg_scale", "n"])
def test_numbers_that_are_none_are_refused(http: httpx.Client, field: str, value: str) -> None:
    body = f'{{"prompt": "x", "{field}": {value}}}'.encode()
    assert field in error_of(http.post(COMPLETIONS, content=body, headers=JSON), 400)["param"]


def test_an_empty_body_is_refused(http: httpx.Client) -> None:
    assert error_of(http.post(CHAT, headers=JSON), 400)["param"] == "body"


def test_lone_surrogates_are_refused(http: httpx.Client) -> None:
    error_of(http.post(COMPLETIONS, content=b'{"prompt": "\\ud800"}', headers=JSON), 400)
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    error_of(http.post(CHAT, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("body", "reason"), [(b'{"prompt": "\xff"}', "UTF-8"), (b"[" * 100_000, "nested too deep")]
)
def test_a_body_that_cannot_be_read_is_told_why(
    http: httpx.Client, body: bytes, reason: str
) -> None:
    error = error_of(http.post(COMPLETIONS, content=body, headers=JSON), 400)
    assert reason in error["message"]
    assert error["param"] == "body"


def test_a_compressed_body_is_refused_by_the_headers_name(http: httpx.Client) -> None:
    body = gzip.compress(json.dumps(HI).encode())
    response = http.post(CHAT, content=body, headers=JSON | {"Content-Encoding": "gzip"})
    assert "Content-Encoding, got gzip" in error_of(response, 400)["message"]
    headers = JSON | {"Content-Encoding": "identity"}
    assert http.post(CHAT, content=json.dumps(HI), headers=headers).status_code == 200


def test_another_content_type_is_refused(http: httpx.Client) -> None:
    error = error_of(http.post(CHAT, data={"a": "b"}), 400)
    assert "application/json" in error["message"]
    error_of(http.post(CHAT, content=json.dumps(HI)), 400)


def test_a_charset_beside_the_content_type_is_fine(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert http.post(CHAT, content=json.dumps(HI), headers=headers).status_code == 200


def test_a_message_does_not_grow_with_what_was_sent(http: httpx.Client) -> None:
    long = "y" * 100_000
    for body in ({"temperature": long}, {"prompt": [long, 1] * 100}, {"remasking": long}):
        response = http.post(COMPLETIONS, json={"prompt": "x"} | body)
        error_of(response, 400)
        assert len(response.content) < 4000


def test_other_methods_and_paths(http: httpx.Client) -> None:
    assert http.get(CHAT).headers["Allow"] == "POST"
    assert error_of(http.get(CHAT), 405)["message"].endswith(" It takes POST.")
    for path in ("/v1/nope", "/v1", "/nope"):
        assert error_of(http.get(path), 404)["message"] == f"There is no route GET {path}."
    assert http.get("/v2/nope").json() == {"error": "There is no route GET /v2/nope."}


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/responses"])
def test_a_base_url_without_its_prefix_is_told(http: httpx.Client, path: str) -> None:
    assert "below /v1" in error_of(http.post(path, json=HI), 404)["message"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/openai/v1/audio/transcriptions", "text only"),
        ("/v1/files", "Nothing is stored"),
        ("/rerank", "no embeddings, scores"),
        ("/api/chat", "use /v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1 twice"),
        ("/openai/v1/v1/models", "/v1 twice"),
        ("/v1/chat/completion", "Did you mean /v1/chat/completions?"),
        ("/openai/v1/completion", "Did you mean /v1/completions?"),
        ("/docs", "--enable_docs_url true"),
    ],
)
def test_a_route_of_other_servers_is_refused_with_the_reason(
    http: httpx.Client, path: str, why: str
) -> None:
    message = error_of(http.post(path, json={"input": "x"}), 404)["message"]
    assert message.startswith(f"There is no route POST {path}. ")
    assert why in message


def test_a_slash_for_the_colon_of_v1_is_told(http: httpx.Client) -> None:
    response = http.post("/v1/models/tiny/predict", json={"instances": ["x"]})
    assert "a colon before the verb: /v1/models/tiny:predict." in str(error_of(response, 405))


def test_a_fixed_model_names_the_option_that_frees_it(http: httpx.Client) -> None:
    response = http.post("/v2/repository/models/tiny/unload")
    assert response.status_code == 403
    assert "--enable_repository_control true" in response.json()["error"]


def test_the_connection_goes_on_after_every_error(http: httpx.Client) -> None:
    ports = set()
    for request in (
        {"json": HI | {"temperature": 9}},
        {"content": b"{", "headers": JSON},
        {"json": HI | {"model": "nope", "stream": True}},
        {"data": {"a": "b"}},
        {"json": HI},
    ):
        response = http.post(CHAT, **request)
        ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])
    for path in ("/v1/models/nope:predict", "/v1/models/tiny:predict", "/v2/models/tiny/infer"):
        response = http.post(path, content=b"\xff", headers=JSON)
        assert response.status_code in (400, 404)
        ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])
    headers = JSON | {"Inference-Header-Content-Length": "no number"}
    response = http.post("/v2/models/tiny/infer", content=b"x", headers=headers)
    assert response.status_code in (400, 500)
    ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])
    assert http.post(CHAT, json=HI).status_code == 200
    assert len(ports) == 1


def nested(depth: int) -> Any:
    return json.loads('{"a":' * depth + "1" + "}" * depth)


@pytest.mark.parametrize("depth", [300, 900])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HI | {"chat_template_kwargs": {"a": None}}),
        (CHAT, HI | {"response_format": {"type": "json_schema", "json_schema": {"schema": None}}}),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "extra": None}], "max_tokens": 4}),
        (CHAT, HI | {"tools": [{"type": "function", "function": {"name": "f", "a": None}}]}),
        (CHAT, HI | {"vllm_xargs": {"a": None}}),
        (CHAT, HI | {"unknown": None}),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 4, "structured_outputs": {"json": None}}),
        (RESPONSES, {"input": [{"role": "user", "content": "x", "extra": None}]}),
        ("/v1/responses", {"input": "x", "metadata": {"a": None}, "max_output_tokens": 4}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi", "extra": None}]}),
        ("/v1/models/tiny:predict", {"instances": [{"prompt": "hi", "unknown": None}]}),
        ("/v2/models/tiny/infer", {"inputs": [], "parameters": {"a": None}}),
    ],
)
def test_nesting_never_breaks_the_server(
    http: httpx.Client, path: str, body: dict[str, Any], depth: int
) -> None:
    content = json.dumps(body).replace("null", json.dumps(nested(depth)))
    response = http.post(path, content=content, headers=JSON)
    assert response.status_code in (200, 400), response.text
    assert response.status_code == 200 or response.json()["error"]
