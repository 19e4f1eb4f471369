"""What models are told of functions, and what forced calls must look like."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.openai.engine import limits
from tests.openai.test_structured import TOKENIZER, accepts, grammars
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.prompts import chat_prompt
from vdiff_kserve.openai.protocol import ChatCompletionRequest
from vdiff_kserve.openai.structured import answer_format
from vdiff_kserve.openai.tools import ToolUse, calls_or, forced_calls, tool_use

F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
    "x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}}}  # fmt: skip
G = {"type": "function", "function": {"name": "g", "description": "Nothing.", "parameters": {
    "const": {}}}}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "f"}}
CALL_F = '{"name": "f", "arguments": {"x": 12}}'
CALL_G = '{"name": "g", "arguments": {}}'
QWEN = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}{% for k, v in "
    "c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}>{% endfor %};{% endfor %}"
)


def request(**fields: Any) -> ChatCompletionRequest:
    messages = fields.pop("messages", [{"role": "user", "content": "hi"}])
    return ChatCompletionRequest.model_validate({"messages": messages, **fields})


def use_of(*, settings: dict[str, Any] | None = None, **fields: Any) -> ToolUse:
    use = tool_use(request(tools=[F, G], **fields), limits(**(settings or {})))
    assert use is not None
    return use


def forced(parser: str, *, takes_tools: bool = True, **fields: Any) -> Any:
    settings = {"tool_call_parser": parser, "template_takes_tools": takes_tools}
    return grammars().compile(forced_calls(use_of(settings=settings, **fields)).grammar).matcher


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def test_required_calls_are_one_or_more_of_the_functions() -> None:
    matcher = forced("hermes", tool_choice="required")
    assert accepts(matcher, hermes(CALL_F))
    assert accepts(matcher, hermes(CALL_G, CALL_F, CALL_F))
    for text in ("", "hi", hermes('{"name": "h", "arguments": {}}'), CALL_F,
                 hermes('{"name": "g", "arguments": {"x": 1}}')):  # fmt: skip
        assert not accepts(matcher, text)


def test_the_json_parser_wants_a_list() -> None:
    matcher = forced("json", tool_choice="required")
    assert accepts(matcher, f"[{CALL_F}, {CALL_G}]")
    assert not accepts(matcher, CALL_F)


def test_only_one_call_where_parallel_ones_are_forbidden() -> None:
    matcher = forced("hermes", tool_choice="required", parallel_tool_calls=False)
    assert accepts(matcher, hermes(CALL_F))
    assert not accepts(matcher, hermes(CALL_F, CALL_G))


@pytest.mark.parametrize("takes_tools", [True, False])
def test_the_only_function_that_is_required_is_a_named_one(takes_tools: bool) -> None:
    settings = {"template_takes_tools": takes_tools}
    required = tool_use(request(tools=[F], tool_choice="required"), limits(**settings))
    named = use_of(settings=settings, tool_choice=NAMED)
    assert required is not None
    assert required.only_arguments == named.only_arguments == (not takes_tools)
    assert required.many == takes_tools
    assert not use_of(settings=settings, tool_choice="required").only_arguments


@pytest.mark.parametrize("parser", ["hermes", "json"])
def test_an_answer_in_a_format_may_call_functions_before(parser: str) -> None:
    use = use_of(settings={"tool_call_parser": parser})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = answer_format(request(response_format=form), limits())
    assert answer is not None
    matcher = grammars().compile(calls_or(use, answer).grammar).matcher
    assert accepts(matcher, '{"a": 5}')
    calls = hermes(CALL_F, CALL_G) if parser == "hermes" else f"[{CALL_F}, {CALL_G}]"
    assert accepts(matcher, calls)
    assert accepts(matcher, calls.replace('"x": 12', '"y": "z"')), "as without a format"
    for text in ("hi", '{"b": 5}', calls + '{"a": 5}', calls.replace('"f"', '"h"')):
        assert not accepts(matcher, text)


def test_a_named_function_is_the_only_one() -> None:
    matcher = forced("hermes", tool_choice=NAMED)
    assert accepts(matcher, hermes(CALL_F))
    assert not accepts(matcher, hermes(CALL_G))


def test_a_function_that_tells_no_parameters_takes_none() -> None:
    bare = {"type": "function", "function": {"name": "h"}}
    anything = {"type": "function", "function": {"name": "f", "parameters": {}}}
    use = tool_use(request(tools=[bare, anything], tool_choice="required"), limits())
    matcher = grammars().compile(forced_calls(use).grammar).matcher
    assert accepts(matcher, hermes('{"name": "h", "arguments": {}}', CALL_F))
    assert not accepts(matcher, hermes('{"name": "h", "arguments": {"x": 12}}'))


def test_a_model_that_knows_no_tools_writes_the_arguments_of_a_named_one() -> None:
    assert accepts(forced("hermes", takes_tools=False, tool_choice=NAMED), '{"x": 12}')


def test_calls_that_are_the_models_choice_can_be_switched_off() -> None:
    assert use_of().forced is False
    off = {"auto_tool_choice": False}
    for choice in ({}, {"tool_choice": "auto"}):
        with pytest.raises(RequestError, match="disable_auto_tool_choice") as caught:
            use_of(settings=off, **choice)
        assert caught.value.param == "tool_choice"
    assert use_of(settings=off, tool_choice="required").forced
    assert use_of(settings=off, tool_choice=NAMED).forced


def prompt_of(template: str, settings: dict[str, Any] | None = None, **fields: Any) -> str:
    tokenizer = load_copy(template)
    takes = {"template_takes_tools": "tools" in template}
    ids = chat_prompt(request(**fields), tokenizer, limits(**takes | (settings or {})))
    return str(tokenizer.decode(ids))


def load_copy(template: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "2"},
]  # fmt: skip


def test_a_template_that_takes_tools_gets_them_and_calls_as_objects() -> None:
    text = prompt_of(QWEN, tools=[F, G], messages=CONVERSATION)
    assert text == "[f][g]system:Be kind.;user:go;assistant:<f x=1>;tool:2;"
    assert prompt_of(QWEN, tools=[F, G], tool_choice="none").startswith("user:hi;")


def test_other_templates_get_a_system_text_and_calls_as_text() -> None:
    text = prompt_of(PLAIN, tools=[F, G], messages=CONVERSATION)
    lines = text.split("\n")
    assert lines[0] == "system:Be kind."
    assert lines[2] == "You may call these functions:"
    assert json.loads(lines[3]) == F["function"]
    assert json.loads(lines[4]) == G["function"]
    assert text.endswith(
        'assistant:<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>;'
        "user:<tool_response>\n2\n</tool_response>;"
    )


def test_the_system_text_can_be_left_out() -> None:
    off = {"tools_in_prompt": False}
    assert prompt_of(PLAIN, settings=off, tools=[F]) == "user:hi;"
    assert prompt_of(PLAIN, tools=[F]).startswith("system:You may call these functions:\n")


def test_the_json_parser_has_a_text_of_its_own() -> None:
    text = prompt_of(PLAIN, settings={"tool_call_parser": "json"}, tools=[F])
    assert '[{"name": ..., "arguments": ...}]' in text
    assert "<tool_call>" not in text
