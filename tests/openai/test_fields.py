"""Every field of vLLM's requests has a place in the tables, and does what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.fields import (
    IGNORED,
    MAX_UNKNOWN,
    NAMED_ELSEWHERE,
    REFUSED,
    SUPPORTED,
    refuse_unsupported,
    render_table,
)
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest

SCHEMAS = json.loads(
    (Path(__file__).parents[1] / "data/schemas/vllm-0.24.0-openai-schemas.json").read_text()
)
KINDS: tuple[type[BaseModel], ...] = (ChatCompletionRequest, CompletionRequest)
MESSAGES = [{"role": "user", "content": "x"}]
ASKING: dict[str, Any] = {
    "audio": {"voice": "alloy"}, "modalities": ["text", "audio"], "web_search_options": {},
    "best_of": 2, "chat_template": "x", "documents": [{"a": "b"}],
    "function_call": {"name": "f"}, "functions": [{"name": "f"}], "prompt_embeds": "x",
    "guided_choice": ["a"], "guided_grammar": "x", "guided_json": {}, "guided_regex": "a",
    "prompt_logprobs": 0, "repetition_detection": {},
    "thinking_token_budget": 3, "use_beam_search": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_vllm_is_known(kind: type[BaseModel]) -> None:
    theirs = SCHEMAS[kind.__name__]["properties"].keys()
    assert theirs <= kind.model_fields.keys()
    assert theirs <= SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys()


def test_every_own_field_is_in_exactly_one_table() -> None:
    fields = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    for field in fields:
        assert (field in SUPPORTED) + (field in IGNORED) + (field in REFUSED) == 1, field
    assert (SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys()) == fields


def test_the_table_of_the_documentation_is_current_and_has_every_field_of_vllm() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    table = render_table()
    assert table in page, "python -m vdiff_kserve.openai.fields writes it anew"
    for kind in KINDS:
        for field in SCHEMAS[kind.__name__]["properties"]:
            assert f"| `{field}` |" in table


def request_with(field: str, value: Any) -> BaseModel:
    if field in CompletionRequest.model_fields:
        return CompletionRequest.model_validate({"prompt": "x", field: value})
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, field: value})


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_refused_with_its_reason_when_it_asks_for_something(
    field: str,
) -> None:
    with pytest.raises(RequestError, match=f"`{field}`") as caught:
        refuse_unsupported(request_with(field, ASKING[field]))
    assert caught.value.status == 400
    assert REFUSED[field].reason in caught.value.message
    assert caught.value.response.error.param == field


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, each in sorted(REFUSED.items()) for v in each.neutral]
)
def test_a_refused_field_may_hold_its_neutral_value(field: str, value: Any) -> None:
    refuse_unsupported(request_with(field, value))


def test_an_unknown_field_is_ignored() -> None:
    refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", "store": True}))


@pytest.mark.parametrize(
    ("field", "meant"),
    [("treshold", "threshold"), ("Block_Length", "block_length"), *NAMED_ELSEWHERE.items()],
)
def test_decoding_field_by_another_name_is_refused_with_its_own(field: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"no field {field}. Did you mean {meant}[?]"):
        refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", field: 1}))


def test_names_from_elsewhere_stand_for_fields_and_are_none_themselves() -> None:
    assert set(NAMED_ELSEWHERE.values()) <= SUPPORTED.keys()
    assert NAMED_ELSEWHERE.keys().isdisjoint(SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys())


@pytest.mark.parametrize("body", [{"foo": 1}, {"block_size": None}, {"top_a": 0.5}])
def test_other_unknown_fields_and_empty_ones_are_ignored(body: dict[str, Any]) -> None:
    refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", **body}))


def test_only_so_many_unknown_fields_are_compared() -> None:
    """Comparing takes time, and a body has room for millions of them."""
    unknown = {f"u{i}": 1 for i in range(MAX_UNKNOWN)}
    many = CompletionRequest.model_validate({"prompt": "x", **unknown, "treshold": 0.5})
    refuse_unsupported(many)
    unknown.popitem()
    few = CompletionRequest.model_validate({"prompt": "x", **unknown, "treshold": 0.5})
    with pytest.raises(RequestError, match="Did you mean threshold"):
        refuse_unsupported(few)
