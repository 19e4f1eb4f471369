"""Every field of vLLM's requests has a place in the tables, and does what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.fields import IGNORED, REFUSED, SUPPORTED, refuse_unsupported
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest

SCHEMAS = json.loads(
    (Path(__file__).parents[1] / "data/schemas/vllm-0.24.0-openai-schemas.json").read_text()
)
KINDS: tuple[type[BaseModel], ...] = (ChatCompletionRequest, CompletionRequest)
MESSAGES = [{"role": "user", "content": "x"}]
ASKING: dict[str, Any] = {
    "allowed_token_ids": [1], "bad_words": ["x"], "best_of": 2, "chat_template": "x",
    "documents": [{"a": "b"}], "echo": True, "frequency_penalty": 0.5,
    "function_call": {"name": "f"}, "functions": [{"name": "f"}],
    "include_stop_str_in_output": True, "logit_bias": {"1": 1},
    "min_p": 0.1, "min_tokens": 1, "presence_penalty": 1, "prompt_embeds": "x",
    "prompt_logprobs": 0, "repetition_detection": {}, "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"}, "return_prompt_text": True,
    "return_token_ids": True, "skip_special_tokens": False, "structured_outputs": {"regex": "a"},
    "suffix": "", "thinking_token_budget": 3, "tool_choice": "auto",
    "tools": [{"type": "function"}], "top_k": 5, "top_logprobs": 2, "truncate_prompt_tokens": 3,
    "use_beam_search": True, "vllm_xargs": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_vllm_is_known(kind: type[BaseModel]) -> None:
    theirs = SCHEMAS[kind.__name__]["properties"].keys()
    assert theirs <= kind.model_fields.keys()
    assert theirs <= SUPPORTED | IGNORED.keys() | REFUSED.keys()


def test_every_own_field_is_in_exactly_one_table() -> None:
    fields = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    for field in fields:
        assert (field in SUPPORTED) + (field in IGNORED) + (field in REFUSED) == 1, field
    assert (SUPPORTED | IGNORED.keys() | REFUSED.keys()) == fields


def request_with(field: str, value: Any) -> BaseModel:
    if field in CompletionRequest.model_fields and field != "logprobs":
        return CompletionRequest.model_validate({"prompt": "x", field: value})
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, field: value})


@pytest.mark.parametrize("field", sorted(REFUSED.keys() - {"logprobs"}))
def test_a_refused_field_is_refused_when_it_asks_for_something(field: str) -> None:
    with pytest.raises(RequestError, match=f"`{field}`") as caught:
        refuse_unsupported(request_with(field, ASKING[field]))
    assert caught.value.status == 400
    assert caught.value.response.error.param == field


def test_logprobs_are_refused_also_when_they_are_zero() -> None:
    for request in (
        CompletionRequest(prompt="x", logprobs=0),
        ChatCompletionRequest(messages=MESSAGES, logprobs=True),
    ):
        with pytest.raises(RequestError, match="`logprobs`"):
            refuse_unsupported(request)


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in sorted(REFUSED.items()) for v in values]
)
def test_a_refused_field_may_hold_its_neutral_value(field: str, value: Any) -> None:
    if field == "logprobs" and value is False:
        refuse_unsupported(ChatCompletionRequest(messages=MESSAGES, logprobs=False))
    else:
        refuse_unsupported(request_with(field, value))


def test_tools_that_must_not_be_used_are_accepted() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    refuse_unsupported(ChatCompletionRequest(messages=MESSAGES, tools=tools, tool_choice="none"))


def test_an_unknown_field_is_ignored() -> None:
    refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", "store": True}))
