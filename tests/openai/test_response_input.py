"""From a request to the Responses API to the chat that it stands for."""

from __future__ import annotations

from typing import Any

import pytest

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.protocol import ChatCompletionRequest
from vdiff_kserve.openai.response_input import as_chat, in_own_names
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.structured_fields import ResponseFormat
from vdiff_kserve.openai.tool_fields import FunctionName, NamedTool

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return as_chat(ResponsesRequest.model_validate({"input": "x"} | fields))


def messages(**fields: Any) -> list[dict[str, Any]]:
    return [each.model_dump(exclude_unset=True) for each in chat(**fields).messages]


def test_sampling_and_decoding_fields_are_those_of_a_chat() -> None:
    given = {"temperature": 0.5, "seed": 3, "policy": "threshold", "stop": ["a"], "top_k": 4}
    made = chat(**given, max_output_tokens=7, top_logprobs=2, request_id="r", timeout=3)
    assert {name: getattr(made, name) for name in given} == given
    assert made.max_completion_tokens == 7
    assert made.logprobs is True
    assert made.top_logprobs == 2
    assert (made.request_id, made.timeout) == ("r", 3)


def test_what_is_not_said_stays_unsaid() -> None:
    assert "temperature" not in chat().model_fields_set
    assert chat().response_format is None
    assert chat().tools is None
    assert chat(text={"format": {"type": "text"}, "verbosity": "low"}).response_format is None


def test_a_schema_of_the_text_is_a_response_format() -> None:
    form = {"type": "json_schema", "name": "point", "schema": SCHEMA, "strict": True}
    made = chat(text={"format": form}).response_format
    assert made is not None
    assert made.model_dump(exclude_unset=True, by_alias=True) == {
        "type": "json_schema",
        "json_schema": {"name": "point", "schema": SCHEMA, "strict": True},
    }
    assert chat(text={"format": {"type": "json_object"}}).response_format == ResponseFormat(
        type="json_object"
    )


def test_functions_are_a_chats_tools() -> None:
    function = {"name": "f", "parameters": SCHEMA, "strict": True, "description": "d"}
    made = chat(
        tools=[{"type": "function", **function}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
    )
    assert made.tools is not None
    assert [tool.model_dump(exclude_unset=True) for tool in made.tools] == [
        {"type": "function", "function": function}
    ]
    assert made.tool_choice == NamedTool(function=FunctionName(name="f"))
    assert made.parallel_tool_calls is False
    assert chat(tool_choice="required").tool_choice == "required"


def test_calls_and_their_outputs_are_messages_of_a_chat() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "go"},
        call | {"call_id": "c1", "id": "fc_1", "status": "completed"},
        call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "2"}],
        },
    ]
    function = {"name": "f", "arguments": "{}"}
    assert messages(input=items) == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
    ]
    assert messages(input=items[:3])[-1]["tool_calls"][1]["id"] == "c2"


def test_calls_belong_to_the_assistants_message_before_them() -> None:
    """Many templates want that roles take turns."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "go"},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "reasoning", "summary": []},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"role": "assistant", "content": "Done."},
    ]
    made = messages(input=items)
    assert [each["role"] for each in made] == [
        "user", "assistant", "tool", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert [each["content"] for each in made] == ["go", "I look.", "1", "", "2", "Done."]
    assert [len(each.get("tool_calls", ())) for each in made] == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("field", "told"),
    [("max_tokens", "max_output_tokens"), ("max_completion_tokens", "max_output_tokens"),
     ("messages", "input"), ("logprobs", "top_logprobs")],
)  # fmt: skip
def test_a_chats_name_for_a_field_is_refused_with_the_routes(field: str, told: str) -> None:
    with pytest.raises(RequestError, match=f"no field {field} here; it is {told}") as caught:
        chat(**{field: 3})
    assert caught.value.param == field
    chat(**{field: None})


def test_other_fields_go_on_to_the_chat() -> None:
    made = chat(treshold=0.5, chat_template="x", prompt_cache_key="k")
    assert made.chat_template == "x"
    assert made.model_extra == {"treshold": 0.5, "prompt_cache_key": "k"}


def test_what_may_be_included_is_named() -> None:
    assert not chat(include=["reasoning.encrypted_content"]).logprobs
    with pytest.raises(RequestError, match=r"logprobs, .*, got zz") as caught:
        chat(include=["message.output_text.logprobs", "zz"])
    assert caught.value.param == "include"


def test_parts_are_joined_and_refusals_are_text() -> None:
    parts = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    made = messages(instructions="i", input=[{"role": "assistant", "content": parts}])
    assert made == [
        {"role": "system", "content": "i"},
        {"role": "assistant", "content": "a\nno"},
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("messages.0.content", "input.0.content"), ("max_completion_tokens", "max_output_tokens"),
     ("response_format", "text.format"), ("seed", "seed"), (None, None)],
)  # fmt: skip
def test_refusals_have_the_names_of_the_route(theirs: str | None, ours: str | None) -> None:
    refusal = RequestError(f"{theirs} is wrong.", param=theirs)
    refusal.counted = True
    with pytest.raises(RequestError) as caught, in_own_names():
        raise refusal
    assert caught.value.param == ours
    assert caught.value.message == f"{ours} is wrong."
    assert caught.value.counted
