"""Nonsense in every field: the server refuses or answers, and never breaks."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.response_objects import ResponsesRequest

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: tuple[tuple[type[BaseModel], str, dict[str, Any]], ...] = (
    (ChatCompletionRequest, "/v1/chat/completions", {"messages": HI, "max_tokens": 4}),
    (CompletionRequest, "/v1/completions", {"prompt": "hi", "max_tokens": 4}),
    (ResponsesRequest, "/v1/responses", {"input": "hi", "max_output_tokens": 4}),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 1.5, 0.5, 1e308, -1e308, 2**70, -(2**63)),
    *("", "x", "random", "apd", "prefix", "\x00", "\ud800", "<|eot_id|>", "a" * 5000),
    *([], [1], ["a"], [[1, 2]], [{}], {}, {"a": 1}, {"type": "text"}),
    *(HI, [{"role": "\x00", "content": "x"}], [{"role": "user", "content": [{"text": "\ud800"}]}]),
)


@pytest.mark.parametrize("seed", range(4))
def test_nonsense_is_refused_or_answered(http: httpx.Client, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        kind, path, base = chance.choice(ENDPOINTS)
        fields = chance.sample(sorted(kind.model_fields), chance.choice([1, 1, 1, 2, 3]))
        body = base | {field: chance.choice(VALUES) for field in fields}
        if chance.random() < 0.1:
            path = "/v1/models/tiny:predict"
            body = {"instances": [body], "parameters": chance.choice(VALUES)}
        headers = {"Content-Type": "application/json"}
        response = http.post(path, content=json.dumps(body).encode(), headers=headers)
        assert response.status_code in (200, 400, 404), body
        assert response.status_code == 200 or response.json()["error"]
    assert http.get("/health").status_code == 200
