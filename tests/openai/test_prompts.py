"""From messages to what the model reads."""

from __future__ import annotations

from typing import Any

import pytest

from tests.openai.engine import limits
from tests.server.checkpoint import make_tokenizer
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.prompts import chat_prompt
from vdiff_kserve.openai.protocol import ChatCompletionRequest

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
KNOWS_DEVELOPERS = (
    "{% for m in messages %}{{ 'dev' if m.role == 'developer' else m.role }}:{{ m.content }};"
    "{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "f"}}


def rendered(template: str, *messages: dict[str, Any], **fields: Any) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    request = ChatCompletionRequest.model_validate({"messages": messages, **fields})
    ids = chat_prompt(request, tokenizer, limits())
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_a_developers_message_is_the_systems_where_the_template_has_no_such_role() -> None:
    message = {"role": "developer", "content": "be brief"}
    assert rendered(PLAIN, message) == "system:be brief;"
    assert rendered(KNOWS_DEVELOPERS, message) == "dev:be brief;"
    told = rendered(PLAIN, message, tools=[TOOL])
    assert told.startswith("system:be brief\n\nYou may call these functions:")
    assert told.count("system:") == 1


@pytest.mark.parametrize(
    ("role", "meant"), [("usr", "user"), ("User", "user"), ("assistent", "assistant")]
)
def test_a_misspelled_role_is_refused_unless_the_template_names_it(role: str, meant: str) -> None:
    message = {"role": role, "content": "x"}
    with pytest.raises(RequestError, match=f"Did you mean {meant}[?] Roles are system") as caught:
        rendered(PLAIN, message)
    assert caught.value.param == "messages.0.role"
    assert rendered(PLAIN.replace("m.role", f"'a' if m.role == '{role}' else m.role"), message)


@pytest.mark.parametrize("role", ["user", "assistant", "critic", "user1", "function"])
def test_other_roles_are_the_templates(role: str) -> None:
    assert rendered(PLAIN, {"role": role, "content": "x"}) == f"{role}:x;"


def test_what_the_assistant_refused_with_is_its_message() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert rendered(PLAIN, refused) == "assistant:I will not.;"
    assert rendered(PLAIN, refused | {"content": "Yes."}) == "assistant:Yes.;"


def test_an_assistant_may_have_said_nothing() -> None:
    silent = {"role": "assistant", "content": None}
    assert rendered(PLAIN, silent) == rendered(PLAIN, {"role": "assistant"}) == "assistant:;"
    assert rendered(PLAIN, silent | {"tool_calls": []}) == "assistant:;"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "tool", "tool_call_id": "c"}, "messages.0.content"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages.0.function_call"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        rendered(PLAIN, message)
    assert caught.value.param == param
    assert param in caught.value.message
