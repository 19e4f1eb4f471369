"""`/tokenize`, `/detokenize`, `/load`, unknown routes, and how much a request may hold."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.checkpoint import make_tokenizer
from tests.server.test_errors import error_of

TOKENIZER = make_tokenizer()
HI = [{"role": "user", "content": "hi there"}]
AS_TEXT = (
    "<|start_header_id|>user<|end_header_id|>\n\nhi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def tokenize(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_becomes_the_tokens_that_a_completion_would_use(http: httpx.Client) -> None:
    given = tokenize(http, prompt="the tale", model="ref")
    ids = TOKENIZER.encode("the tale")
    assert given == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    answer = http.post("/v1/completions", json={"prompt": "the tale", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == given["count"]
    assert tokenize(http, prompt="")["tokens"] == []


def test_the_tokens_texts_come_when_asked_for(http: httpx.Client) -> None:
    given = tokenize(http, prompt="the", return_token_strs=True)
    assert given["token_strs"] == ["th", "e"]


def test_messages_become_the_tokens_that_a_chat_would_use(http: httpx.Client) -> None:
    given = tokenize(http, messages=HI)
    assert given["tokens"] == TOKENIZER.encode(AS_TEXT)
    chat = {"messages": HI, "max_tokens": 1}
    usage = http.post("/v1/chat/completions", json=chat).json()["usage"]
    assert usage["prompt_tokens"] == given["count"]
    short = tokenize(http, messages=HI, add_generation_prompt=False)
    assert short["tokens"] == TOKENIZER.encode(AS_TEXT.partition("<|start_header_id|>a")[0])


def test_tokens_become_text_again(http: httpx.Client) -> None:
    for text in ("the tale", AS_TEXT, "h\u00e4\u20ac\U0001f600"):
        response = http.post("/detokenize", json={"tokens": TOKENIZER.encode(text)})
        assert response.json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert http.post("/detokenize", json={"tokens": [99999]}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "body.prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "body.prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "forbidden", "content": "x"}]}, 400, "messages"),
        ("/tokenize", {"messages": HI, "tools": [{}]}, 400, "body.tools"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": "perhaps"}, 400, "body.add_g"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/detokenize", {}, 400, "body.tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "body.tokens.0"),
        ("/detokenize", {"tokens": [2**40]}, 400, "body.tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model"),
    ],
)
def test_what_cannot_be_converted_names_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    headers = {"Content-Type": "application/json"}
    error = error_of(http.post(path, content=json.dumps(body), headers=headers), status)
    assert error["param"].startswith(param)


def test_a_long_text_does_not_hold_up_the_others(http: httpx.Client) -> None:
    """A million characters take the tokenizer a while; the server answers meanwhile."""
    took: list[float] = []

    def convert() -> None:
        url = http.base_url.join("/tokenize")
        begun = time.perf_counter()
        response = httpx.post(url, json={"prompt": "the tale " * 120_000}, timeout=120)
        took.append(time.perf_counter() - begun)
        assert response.json()["count"] > 300_000

    thread = threading.Thread(target=convert)
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        begun = time.perf_counter()
        assert http.get("/version").status_code == 200
        slowest = max(slowest, time.perf_counter() - begun)
        time.sleep(0.01)
    assert took
    assert slowest < took[0] / 2


def test_load_counts_the_requests_that_run(http: httpx.Client) -> None:
    def load() -> int:
        return http.get("/load").json()["server_load"]

    assert load() == 0
    long = {"prompt": "x", "max_tokens": 80, "ignore_eos": True, "block_length": 80}
    url = http.base_url.join("/v1/completions")
    threads = [
        threading.Thread(target=httpx.post, args=(url,), kwargs={"json": long, "timeout": 120})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    highest = 0
    while any(thread.is_alive() for thread in threads):
        highest = max(highest, load())
    assert highest == 2
    assert load() == 0


@pytest.mark.parametrize("path", ["/v1/nope", "/openai/v1/nope", "/v1/embeddings", "/v1/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_route_of_openais_is_told_in_its_shape(
    http: httpx.Client, method: str, path: str
) -> None:
    error = error_of(http.request(method, path), 404)
    assert error["type"] == "NotFoundError"
    assert f"{method} {path}" in error["message"]


def test_a_wrong_method_is_told_with_the_right_one(http: httpx.Client) -> None:
    response = http.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "param", "most"),
    [
        ({"stop": [f"{i}" for i in range(65)]}, "stop", "at most 64"),
        ({"stop": ["a", "b" * 1025]}, "stop", "at most 1024"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
        ({"n": 21}, "n", "[1, 20]"),
        ({"prompt": ["a"] * 21}, "prompt", "at most 20"),
        ({"prompt": [[1]] * 11, "n": 2}, "prompt", "at most 20"),
        ({"prompt": "a" * (256 * 19 + 1)}, "input_tokens", "maximum context length is 256"),
        ({"prompt": ["a", "a" * (256 * 19 + 1)]}, "input_tokens", "maximum context length is 256"),
    ],
)
def test_a_request_holds_only_so_much(
    http: httpx.Client, body: dict[str, Any], param: str, most: str
) -> None:
    error = error_of(
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2} | body), 400
    )
    assert error["param"] == param
    assert most in error["message"]


def test_what_is_just_within_the_bounds_is_answered(http: httpx.Client) -> None:
    body = {"prompt": ["x"] * 16, "max_tokens": 2, "stop": [f"{i}" * 512 for i in range(10, 74)]}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_many_prompts_are_refused_before_they_are_tokenized(http: httpx.Client) -> None:
    many = ["the tale of a tale " * 10] * 4_000
    begun = time.perf_counter()
    error_of(http.post("/v1/completions", json={"prompt": many}), 400)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    tokenize(http, prompt="".join(many))
    assert first < time.perf_counter() - begun


def test_a_long_conversation_is_refused_before_it_is_tokenized(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a" * 1000}] * 5}]
    error = error_of(http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert "5000 characters" in error["message"]
    assert error["message"].startswith("This model's maximum context length is 256 tokens.")
