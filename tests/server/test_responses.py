"""OpenAI's Responses API as the `openai` SDK and its types see it."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.process import ServerProcess
from tests.server.test_errors import error_of

LONG = {"ignore_eos": True}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each named as its data says."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_text_is_answered(client: OpenAI) -> None:
    answer = client.responses.create(
        model="tiny", input="tell me a tale", max_output_tokens=12, extra_body=LONG
    )
    assert answer.object == "response"
    assert answer.id.startswith("resp_")
    assert answer.model == "tiny"
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == answer.output[0].content[0].text
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert answer.store is False
    assert answer.vdiff["nfe"] == 12


def test_it_is_the_answer_of_the_chat_that_it_stands_for(client: OpenAI) -> None:
    sampling = dict(model="tiny", temperature=0.9, top_p=0.8)
    own = {"seed": 4, "block_length": 8, "stop": ["zq"], "top_k": 50}
    response = client.responses.create(
        **sampling,
        instructions="be brief",
        input=[
            {"role": "user", "content": "hi"},
            {
                "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "hello", "annotations": []}],
            },
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
        ],
        max_output_tokens=30,
        extra_body=own,
    )  # fmt: skip
    chat = client.chat.completions.create(
        **sampling,
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "go on"},
        ],
        max_completion_tokens=30,
        extra_body=own,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.vdiff == chat.vdiff
    assert (response.temperature, response.top_p) == (0.9, 0.8)
    assert response.instructions == "be brief"


def test_without_max_output_tokens_it_has_the_servers_default(client: OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="go", extra_body=LONG)
    assert answer.usage.output_tokens == 24
    assert answer.max_output_tokens is None


def test_the_stream_is_what_the_sdk_follows(client: OpenAI) -> None:
    request = dict(model="tiny", input="tell me a tale", temperature=1.0, max_output_tokens=60)
    own = LONG | {"seed": 1}
    text = client.responses.create(**request, extra_body=own).output_text
    request["extra_body"] = own | {"stop": text[20:23]}
    whole = client.responses.create(**request)
    snapshot = ""
    with client.responses.stream(**request) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                snapshot += event.delta
                assert event.snapshot == snapshot
        final = stream.get_final_response()
    assert snapshot == final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert final.vdiff == whole.vdiff
    assert final.status == whole.status == "completed"


async def test_the_asynchronous_sdk_follows_it_too(server: ServerProcess) -> None:
    async with (
        AsyncOpenAI(base_url=f"{server.url}/openai/v1", api_key="none") as client,
        client.responses.stream(model="tiny", input="x", max_output_tokens=5) as stream,
    ):
        kinds = [event.type async for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_responses_and_events_have_openais_types(http: httpx.Client, logprobs: int | None) -> None:
    body: dict[str, Any] = {"input": "go", "max_output_tokens": 16, "block_length": 4} | LONG
    if logprobs is not None:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": logprobs}
    whole = http.post("/v1/responses", json=body).json()
    Response.model_validate(whole, strict=True)
    events = events_of(http.post("/v1/responses", json=body | {"stream": True}))
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, "response.incomplete"]
    assert kinds.count("response.output_text.delta") >= 4
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    (item,) = events[-1]["response"]["output"]
    (part,) = item["content"]
    (whole_part,) = whole["output"][0]["content"]
    assert "".join(e["delta"] for e in deltas) == part["text"] == whole_part["text"]
    told = [each for e in deltas for each in e["logprobs"]]
    if logprobs is None:
        assert part["logprobs"] is None
        assert told == []
    else:
        assert part["logprobs"] == told == whole_part["logprobs"]
        assert len(told) == 16
        assert all(len(each["top_logprobs"]) == logprobs for each in told)
    assert item["id"] == deltas[0]["item_id"]


def test_what_was_asked_for_is_told_again(http: httpx.Client) -> None:
    asked = {"metadata": {"a": "b"}, "user": "u", "reasoning": {"effort": "low"}, "store": True}
    body = {"input": "x", "max_output_tokens": 2, **asked}
    told = http.post("/v1/responses", json=body).json()
    assert told.items() >= {"metadata": {"a": "b"}, "user": "u", "max_output_tokens": 2}.items()
    assert told["reasoning"] == {"effort": "low"}
    assert told["store"] is False, "nothing is stored, whatever was asked for"
    with_id = http.post("/v1/responses", json=body, headers={"X-Request-Id": "r7"})
    assert with_id.json()["id"] == "resp_r7"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("previous_response_id", "resp_1", "stores no responses"),
        ("conversation", "conv_1", "stores no responses"),
        ("background", True, "stores no responses"),
        ("prompt", {"id": "p"}, "no stored prompts"),
        ("truncation", "auto", "refused, not cut"),
        ("n", 2, "one answer"),
        ("stream_canvas", True, "no place for steps"),
        ("max_output_tokens", 0, "max_output_tokens must be in"),
        ("max_output_tokens", "many", "integer"),
        ("temperature", -1, "temperature"),
        ("top_logprobs", 21, "20"),
        ("input", None, "not be empty"),
        ("input", [], "not be empty"),
        ("input", 3, "input"),
        ("text", {"format": {"type": "yaml"}}, "json_object or json_schema"),
        ("metadata", {"a": "\ud800"}, "can be told again"),
        ("metadata", {"\ud800": 1}, "can be told again"),
        ("reasoning", {"a": [math.nan]}, "can be told again"),
        ("metadata", json.loads('{"a":' * 300 + "1" + "}" * 300), "can be told again"),
        ("user", "\ud800", "lone surrogate"),
        ("tools", [{"type": "web_search"}], "functions only"),
        ("tool_choice", {"type": "mcp"}, "name a function"),
        ("include", ["zz"], "message.output_text.logprobs"),
        ("treshold", 0.5, "Did you mean threshold"),
        ("maxOutputTokens", 5, "Did you mean max_output_tokens"),
        ("instruction", "x", "Did you mean instructions"),
        ("suffix", "x", "a field of completions"),
        ("max_tokens", 5, "it is max_output_tokens"),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    http: httpx.Client, field: str, value: Any, reason: str
) -> None:
    for stream in (False, True):
        body = json.dumps({"input": "x", "stream": stream, field: value})
        headers = {"Content-Type": "application/json"}
        error = error_of(http.post("/v1/responses", content=body, headers=headers), 400)
        assert field in error["param"]
        assert reason in error["message"]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user"}, "input.0.content"),
        ({"content": "x"}, "input.0.role"),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input.0.content",
        ),
        ({"role": "user", "content": [3]}, "input.0.content"),
        ({"type": "item_reference", "id": "x"}, "input.0.type"),
        ({"type": "computer_call"}, "input.0.type"),
        ({"type": ["message"]}, "input.0.type"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input.0.arguments"),
        ({"type": "function_call_output", "call_id": "c"}, "input.0.output"),
    ],
)
def test_a_wrong_item_is_refused_by_its_place(http: httpx.Client, item: Any, param: str) -> None:
    assert error_of(http.post("/v1/responses", json={"input": [item]}), 400)["param"] == param


def test_an_input_that_leaves_no_room_is_told_as_in_chats(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="maximum context length is 256 tokens"):
        client.responses.create(model="tiny", input="a b " * 300)


def test_the_input_is_counted_as_it_would_be_read(client: OpenAI) -> None:
    asked = {"model": "tiny", "input": "one two", "instructions": "Be brief."}
    counted = client.responses.input_tokens.count(**asked)
    assert counted.object == "response.input_tokens"
    answered = client.responses.create(**asked, max_output_tokens=1)
    assert counted.input_tokens == answered.usage.input_tokens
    with pytest.raises(BadRequestError, match="stores no responses"):
        client.responses.input_tokens.count(input="x", previous_response_id="resp_1")


def test_stored_responses_do_not_exist(client: OpenAI) -> None:
    for ask in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        for name in ("resp_1", "resp:1"):
            with pytest.raises(NotFoundError, match="stores no responses") as caught:
                ask(name)
            assert caught.value.param == "response_id"


def test_an_unknown_model_is_told_as_such(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.responses.create(model="nope", input="x")
    assert caught.value.param == "model"
