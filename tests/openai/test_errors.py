"""What clients are told of bodies that are not the route's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from vdiff_kserve.openai.errors import RequestError, invalid_body
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.tokens import DetokenizeRequest

PROMPT = "a text, a list of texts, a list of token ids from 0 on, or a list of such lists"
CHOICE = "none, auto, required, or an object that names a function"


def refusal(kind: type[BaseModel], fields: dict[str, Any]) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    return invalid_body([{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()])


def in_a_message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("kind", "fields", "field", "told"),
    [
        (CompletionRequest, {"prompt": 5}, "prompt", f"Input should be {PROMPT}, got 5"),
        (CompletionRequest, {"prompt": [1, "a"]}, "prompt", f"Input should be {PROMPT}"),
        (CompletionRequest, {"prompt": [[1, "a"]]}, "prompt", f"Input should be {PROMPT}"),
        (CompletionRequest, {"prompt": ["a", "\ud800"]}, "prompt.1", "a lone surrogate"),
        (CompletionRequest, {"prompt": "x", "stop": "\ud800"}, "stop", "a lone surrogate"),
        (ChatCompletionRequest, in_a_message(5), "messages.0.content", "a list of parts, got 5"),
        (ChatCompletionRequest, in_a_message(["x"]), "messages.0.content.0", "be an object, got x"),
        (
            ChatCompletionRequest,
            in_a_message([{"type": 5}]),
            "messages.0.content.0.type",
            "be a valid string, got 5",
        ),
        (
            ChatCompletionRequest,
            in_a_message("x") | {"tool_choice": "any"},
            "tool_choice",
            f"Input should be {CHOICE}, got any",
        ),
        (
            ChatCompletionRequest,
            in_a_message("x") | {"tool_choice": {"type": "function", "name": "f"}},
            "tool_choice.function",
            "Field required",
        ),
        (ResponsesRequest, {"input": 5}, "input", "a text or a list of items, got 5"),
    ],
)
def test_a_field_of_several_forms_is_told_once(
    kind: type[BaseModel], fields: dict[str, Any], field: str, told: str
) -> None:
    error = refusal(kind, fields)
    assert error.param == f"body.{field}"
    assert error.message.startswith(f"The request is not valid. body.{field}: ")
    assert error.message.count("body.") == 1
    assert told in error.message


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (CompletionRequest, {"prompt": [[{}] * 1000]}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * 1000}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [-1] * 1000}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": [1] * 1000}}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(2000)}}),
        (ChatCompletionRequest, {"messages": [{}] * 1000}),
        (ChatCompletionRequest, in_a_message([1] * 1000)),
        (ChatCompletionRequest, in_a_message("x") | {"tools": [{}] * 1000}),
        (ResponsesRequest, {"input": [1] * 1000}),
        (DetokenizeRequest, {"tokens": [-1] * 1000}),
    ],
)
def test_of_a_long_list_one_wrong_item_is_told(
    kind: type[BaseModel], fields: dict[str, Any]
) -> None:
    """Each error takes microseconds and a kilobyte, and a body has room for millions of items."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    assert caught.value.error_count() <= 5


def test_what_clients_are_told_does_not_grow_with_the_errors() -> None:
    errors = [{"type": "missing", "loc": ("body", f"f{i}"), "msg": "m"} for i in range(10**5)]
    error = invalid_body(errors)
    assert error.message.startswith("The request is not valid. body.f0: m; ")
    assert error.message.count("body.") == 5
