"""Structured output and tools with OpenAI's own client, against the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.server.process import ServerProcess

PROMPT = "Extract name and age as JSON: Anna is 34 years old and lives in Paris."
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = {"type": "function", "function": {"name": "person", "parameters": SCHEMA}}
NOTHING = {"type": "function", "function": {"name": "nothing", "parameters": {"const": {}}}}
NAMED = {"type": "function", "function": {"name": "person"}}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def embedded() -> Iterator[ServerProcess]:
    """The embedded model, whose template takes no tools and whose context has no room for them."""
    options = ("--device", "cpu", "--dtype", "float32", "--no_tools_in_prompt")
    with ServerProcess(*options, "--max_schema_bytes", "4096") as process:
        yield process.wait_until_ready()


@pytest.fixture(scope="module")
def client(embedded: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{embedded.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="llada", messages=MESSAGES, **fields)


def test_parse_gives_pydantic_objects(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="llada", messages=MESSAGES, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Anna", age=34)
    assert answer.choices[0].finish_reason == "stop"


def test_parse_streams_too(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="llada", messages=MESSAGES, response_format=Person
    ) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.parsed == Person(name="Anna", age=34)


def test_parse_gives_the_arguments_of_functions(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="llada",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Person, name="person")],
        tool_choice=NAMED,  # type: ignore[arg-type]
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Person(name="Anna", age=34)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_json_object_is_one_object(client: OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"name": "Anna", "age": 34}


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[A-Z][a-z]{2,8}"}, "[A-Z][a-z]{2,8}"),
        ({"regex": r"\w+@\w+\.com\n"}, r"\w+@\w+\.com\n"),
        ({"choice": ["Anna", "Bob"]}, "Anna|Bob"),
        ({"grammar": 'root ::= "I am " ("Anna" | "Bob")'}, "I am (Anna|Bob)"),
        ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, r'\{"name":".*","age":.*\}'),
        ({"json": SCHEMA, "whitespace_pattern": "[ ]?"}, r'\{ ?"name" ?: ?".*" ?, ?"age".*\}'),
        ({"json_object": True}, r"\{.*\}"),
    ],
    ids=str,
)  # fmt: skip
def test_vllms_structured_outputs(client: OpenAI, asked: dict[str, Any], pattern: str) -> None:
    answer = ask(client, max_tokens=60, extra_body={"structured_outputs": asked})
    assert re.fullmatch(pattern, answer.choices[0].message.content, re.DOTALL)
    assert answer.choices[0].finish_reason == "stop"


def test_plain_completions_follow_a_schema_too(client: OpenAI) -> None:
    answer = client.completions.create(
        model="llada",
        prompt=["Anna is 34.", "Bob is 7."],
        max_tokens=40,
        extra_body={"structured_outputs": {"json": SCHEMA}},
    )
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)


def test_kserves_protocols_follow_a_schema_too(embedded: ServerProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    response = httpx.post(
        f"{embedded.url}/v1/models/llada:predict",
        json={"instances": [{"messages": MESSAGES, "response_format": form}]},
        timeout=60,
    )
    assert json.loads(response.json()["predictions"][0]["text"]) == {"name": "Anna", "age": 34}


def test_required_calls_are_whole_and_several_may_be(client: OpenAI) -> None:
    answer = ask(client, tools=[PERSON, NOTHING], tool_choice="required", max_tokens=150)
    calls = answer.choices[0].message.tool_calls
    assert calls
    for call in calls:
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, SCHEMA if call.function.name == "person" else {"const": {}})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None


def test_parallel_tool_calls_can_be_forbidden(client: OpenAI) -> None:
    answer = ask(
        client, tools=[NOTHING], tool_choice="required", parallel_tool_calls=False, max_tokens=150
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("nothing", "{}")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_streamed_calls_join_to_whole_ones(client: OpenAI, choice: Any) -> None:
    fields: Any = {"tools": [PERSON], "tool_choice": choice, "max_tokens": 100}
    if choice == "required":
        fields["parallel_tool_calls"] = False
    chunks = list(ask(client, stream=True, **fields))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert parts[0].id
    assert (parts[0].type, parts[0].function.name) == ("function", "person")
    assert not any(part.id or part.type or part.function.name for part in parts[1:])
    arguments = "".join(part.function.arguments for part in parts)
    jsonschema.validate(json.loads(arguments), SCHEMA)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    whole = ask(client, **fields).choices[0].message.tool_calls[0]
    assert whole.function.arguments == arguments


def test_a_model_may_answer_in_words_where_calls_are_its_own_choice(client: OpenAI) -> None:
    answer = ask(client, tools=[PERSON])
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content) == {"name": "Anna", "age": 34}


def test_calls_and_their_results_can_be_sent_back(client: OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "person", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Anna, 34"},
    ]
    answer = client.chat.completions.create(
        model="llada",
        messages=messages,
        tools=[PERSON],
        max_tokens=8,  # type: ignore[list-item]
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > ask(client, max_tokens=8).usage.prompt_tokens


def test_the_responses_api_tells_calls(client: OpenAI) -> None:
    function: Any = {"type": "function", **PERSON["function"]}  # type: ignore[dict-item]
    fields: Any = {
        "model": "llada",
        "input": PROMPT,
        "tools": [function],
        "tool_choice": {"type": "function", "name": "person"},
        "max_output_tokens": 60,
    }
    (item,) = client.responses.create(**fields).output
    assert (item.type, item.name) == ("function_call", "person")
    assert json.loads(item.arguments) == {"name": "Anna", "age": 34}
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert "response.function_call_arguments.delta" in kinds
    assert (streamed.type, streamed.arguments) == ("function_call", item.arguments)


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Team(BaseModel):
    lead: Person
    mood: Mood
    members: list[Person]


def test_nested_models_with_references_are_followed(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="llada", messages=MESSAGES, response_format=Team, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Team)


JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": JSON_FORMAT, "max_tokens": 5}, "max_tokens", "room for 1"),
        ({"response_format": schema_format({"type": "nothing"})}, "response_format", "nothing"),
        ({"response_format": schema_format({"enum": []})}, "response_format", "nsatisfiable"),
        ({"response_format": schema_format({"not": {}})}, "response_format", "not"),
        ({"response_format": schema_format({"const": 10**30})}, "response_format", "64 bits"),
        ({"structured_outputs": {"regex": "a+"}, "policy": "p2", "stream": True}, "policy", "p2"),
        ({"response_format": schema_format({"title": "x" * 5000})}, "response_format", "4096"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "body.response_format.type", "json_object"),
        ({"response_format": JSON_FORMAT, "structured_outputs": {"regex": "a"}},
         "structured_outputs", "one of them"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "JSON"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "tag"),
        ({"structured_outputs": {"grammar": "root ::= zz"}}, "structured_outputs", "zz"),
        ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "structured_outputs", "used"),
        ({"tools": []}, "tools", "empty"),
        ({"tool_choice": "auto"}, "tool_choice", "tools"),
        ({"tools": [PERSON], "tool_choice": "any"}, "body.tool_choice", "required"),
        ({"tools": [PERSON], "tool_choice": {"type": "function", "function": {"name": "z"}}},
         "tool_choice", "'z'"),
        ({"tools": [{"x": 1}]}, "body.tools.0.function", "required"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "zz"}}}],
          "tool_choice": "required"}, "tools", "zz"),
        ({"tools": [{"function": {"name": "f", "parameters": {"const": 10**30}}}],
          "tool_choice": "required"}, "tools", "64 bits"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f",
          "arguments": "{"}}]}]}, "messages.0.tool_calls", "JSON"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(
    embedded: ServerProcess, fields: dict[str, Any], param: str, reason: str
) -> None:
    body = {"messages": MESSAGES} | fields
    response = httpx.post(f"{embedded.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]
    assert len(error["message"]) < 500
