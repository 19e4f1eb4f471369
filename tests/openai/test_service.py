"""From a request to an answer or a stream, over an engine that answers by script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from threading import Event
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.openai.engine import TOKENIZER, ScriptedEngine, limits, service
from tests.openai.test_structured import grammars
from tests.server.checkpoint import make_tokenizer
from vdiff_kserve.engine import EngineError, EngineStoppedError, QueueFullError
from vdiff_kserve.observability import families
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.intake import MAX_CHARACTERS_AT_ONCE
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.service import GenerationService
from vdiff_kserve.openai.tokenizer_thread import TokenizerThread


def chat(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "hi"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "model": "tiny"} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", "model": "tiny"} | fields)


async def events(
    engine: ScriptedEngine, request: ChatCompletionRequest | CompletionRequest, **settings: object
) -> list[dict[str, Any]]:
    stream = await service(engine, **settings).respond(request)
    texts = [event async for event in stream]
    assert texts[-1] == "data: [DONE]\n\n"
    assert all(t.startswith("data: ") and t.endswith("\n\n") for t in texts)
    return [json.loads(t.removeprefix("data: ")) for t in texts[:-1]]


async def test_a_chat_is_what_the_sdk_expects() -> None:
    engine = ScriptedEngine(["Hello", " you"], finish_reason="stop")
    answer = await service(engine).respond(chat())
    parsed = ChatCompletion.model_validate_json(answer.model_dump_json())
    assert parsed.choices[0].message.content == "Hello you"
    assert parsed.choices[0].finish_reason == "stop"
    assert parsed.usage.completion_tokens == answer.vdiff.tokens_per_forward * answer.vdiff.nfe
    assert answer.vdiff.choices is None


async def test_a_completion_is_what_the_sdk_expects() -> None:
    answer = await service(ScriptedEngine(["a", "b"])).respond(completion())
    parsed = Completion.model_validate_json(answer.model_dump_json())
    assert parsed.choices[0].text == "ab"
    assert parsed.choices[0].finish_reason == "length"


async def test_a_stream_is_what_the_sdk_expects() -> None:
    engine = ScriptedEngine(["Hello", " you", "", " all"])
    chunks = await events(engine, chat(stream=True))
    parsed = [ChatCompletionChunk.model_validate(c, strict=True) for c in chunks]
    deltas = [p.choices[0].delta for p in parsed]
    assert [d.content for d in deltas] == ["Hell", "o yo", "u all"]
    assert [d.role for d in deltas] == ["assistant", None, None]
    assert [p.choices[0].finish_reason for p in parsed] == [None, None, "length"]
    assert "vdiff" in chunks[-1]
    assert "vdiff" not in chunks[0]
    assert "role" not in chunks[1]["choices"][0]["delta"]


@pytest.mark.parametrize(
    ("request_", "first", "last"),
    [
        (
            chat(stream=True, return_token_ids=True),
            ["index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"],
            ["vdiff"],
        ),
        (
            completion(stream=True, return_token_ids=True, stream_options={"include_usage": True}),
            [
                *("index", "text", "logprobs", "finish_reason", "stop_reason"),
                *("token_ids", "prompt_token_ids"),
            ],
            ["usage", "vdiff"],
        ),
        (
            completion(stream=True, prompt="a<|mask:2|>b", infill=True),
            ["index", "text", "holes", "logprobs", "finish_reason", "stop_reason"],
            ["vdiff"],
        ),
    ],
)
async def test_the_fields_of_a_chunk_have_an_order(
    request_: Any, first: list[str], last: list[str]
) -> None:
    chunks = await events(ScriptedEngine(["ab", "c"]), request_)
    head = ["id", "created", "model", "system_fingerprint", "object", "choices"]
    assert list(chunks[-1]) == head + last
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert max((list(choice) for choice in choices), key=len) == first


async def test_the_piece_with_the_finish_reason_has_text_although_the_end_came_alone() -> None:
    engine = ScriptedEngine(["four", ""], finish_reason="stop")
    first, last = await events(engine, chat(stream=True))
    assert first["choices"][0]["delta"]["content"] == "fou"
    assert last["choices"][0]["delta"]["content"] == "r"
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(), "messages"),
        (completion(prompt="x<|eot_id|>"), "prompt"),
        (completion(suffix="x<|eot_id|>"), "prompt"),
        (completion(prompt="x<|mask:1|><|eot_id|>", infill=True), "prompt"),
        (completion(prediction={"content": "x<|eot_id|>"}), "prediction"),
    ],
)
async def test_a_token_that_only_the_tokenizer_has_is_refused(request_: Any, param: str) -> None:
    """It would be an index beyond the model's embedding."""
    with pytest.raises(
        RequestError, match=r"token id 31\d is out of vocabulary; .*\[0, 313\]"
    ) as e:
        await service(ScriptedEngine(["a"]), vocab_size=314).respond(request_)
    assert e.value.param == param


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "r" * 10**5, "content": "x"}],
        [{"role": "user", "content": ""}] * 10**4,
    ],
)
async def test_a_conversation_is_not_tokenized_that_cannot_fit(messages: list[Any]) -> None:
    """Also where the template, not the messages' contents, makes it long."""
    made = service(ScriptedEngine(["a"]))
    with pytest.raises(RequestError, match="characters, which cannot be so few tokens") as caught:
        await made.respond(chat(messages=messages))
    assert caught.value.param == "input_tokens"


async def test_a_checkpoint_without_a_chat_template_says_what_to_do() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    plain = GenerationService(ScriptedEngine(["a"]), tokenizer, limits(), "tiny")
    with pytest.raises(RequestError, match="--chat_template FILE, or send a prompt to"):
        await plain.respond(chat())


async def test_an_event_is_one_line_to_every_client() -> None:
    text = "a\u2028b\u2029c\x85d\ne\u00e9"
    made = service(ScriptedEngine([text], [text]))
    chunks = [event async for event in await made.respond(completion(stream=True))]
    assert [len(chunk.splitlines()) for chunk in chunks] == [2, 2]
    assert json.loads(chunks[0].removeprefix("data: "))["choices"][0]["text"] == text
    request = ResponsesRequest(input="hi", stream=True, model="tiny")
    told = [event async for event in await made.create_response(request)]
    assert {len(event.splitlines()) for event in told} == {3}
    last = json.loads(told[-1].splitlines()[1].removeprefix("data: "))
    assert last["response"]["output"][0]["content"][0]["text"] == text


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("{call}", ["function_call"]),
        ("So: {call}", ["message", "function_call"]),
        ("{call} Done.", ["function_call", "message"]),
        ("{call}\n{call} So: {call}", ["function_call"] * 2 + ["message", "function_call"]),
        ("So: {call} And: {call}", ["message"] + ["function_call"] * 2),
    ],
)
async def test_a_response_has_its_items_in_the_order_of_its_stream(
    text: str, kinds: list[str]
) -> None:
    answer = text.format(call='<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    engine = ScriptedEngine([answer], [answer], finish_reason="stop")
    made = service(engine, max_model_len=1000)
    request = ResponsesRequest.model_validate(
        {"input": "hi", "model": "tiny", "tools": [{"type": "function", "name": "f"}]}
    )
    whole = (await made.create_response(request)).model_dump()["output"]
    request.stream = True
    *_, last = [event async for event in await made.create_response(request)]
    streamed = json.loads(last.splitlines()[1].removeprefix("data: "))["response"]["output"]
    assert [item["type"] for item in whole] == [item["type"] for item in streamed] == kinds
    texts = [item["content"][0]["text"] for item in (*whole, *streamed) if "content" in item]
    assert len(set(texts)) <= 1


async def test_an_empty_answer_still_has_a_last_chunk() -> None:
    (only,) = await events(ScriptedEngine([""], finish_reason="stop"), chat(stream=True))
    assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert only["choices"][0]["finish_reason"] == "stop"


async def test_every_block_has_a_chunk() -> None:
    blocks = ["one block ", "another ", "and a third"]
    assert len(await events(ScriptedEngine(blocks), completion(stream=True))) == 3


async def test_usage_comes_last_when_asked_for() -> None:
    request = completion(stream=True, stream_options={"include_usage": True})
    *_, text, last = await events(ScriptedEngine(["abc"]), request)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["vdiff"]["nfe"] == 1
    assert "usage" not in text


async def test_a_stop_string_ends_the_answer_and_its_row() -> None:
    engine = ScriptedEngine(["abc", "def", None])
    answer = await service(engine).respond(completion(stop="e"))
    assert answer.choices[0].text == "abcd"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "e"
    assert answer.usage.completion_tokens == 5
    assert engine.streams[0].aborted


async def test_choices_and_prompts_become_engine_requests_in_order() -> None:
    engine = ScriptedEngine(["a"], ["b"], ["c"], ["d"])
    request = completion(prompt=["x", "yz"], n=2, seed=2**63 - 1, temperature=1, max_tokens=99)
    answer = await service(engine).respond(request)
    assert [c.text for c in answer.choices] == ["a", "b", "c", "d"]
    assert [len(r.prompt_ids) for r in engine.requests] == [1, 1, 2, 2]
    assert [r.max_tokens for r in engine.requests] == [99, 99, 98, 98]
    assert [r.decoding.seed for r in engine.requests] == [2**63 - 1, -(2**63)] * 2
    assert answer.usage.prompt_tokens == 3


async def test_answers_are_interleaved_as_they_come() -> None:
    engine = ScriptedEngine(["ab", "c", "d"], ["xy"])
    chunks = await events(engine, completion(prompt="x", n=2, temperature=1, stream=True))
    assert [c["choices"][0]["index"] for c in chunks] != sorted(
        c["choices"][0]["index"] for c in chunks
    )
    assert [len(c.get("vdiff", {})) > 0 for c in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_openais_library_keeps_streamed_answers_apart_that_begin_in_another_order() -> None:
    engine = ScriptedEngine(["", "", "one"], ["two ", "more"], finish_reason="stop")
    fields = {"n": 2, "temperature": 1, "logprobs": True, "return_token_ids": True}
    chunks = await events(engine, chat(stream=True, **fields))
    assert [c["choices"][0]["index"] for c in chunks] == [0, 1, 1, 1, 0]
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    choices = state.get_final_completion().choices
    assert [c.message.content for c in choices] == ["one", "two more"]
    counts = [len(TOKENIZER.encode(c.message.content)) + 1 for c in choices]
    assert [len(c.logprobs.content) for c in choices] == counts
    assert [c for c in chunks if "prompt_token_ids" in c] == chunks[:1]


async def test_tokens_of_text_that_may_become_a_call_are_told() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    texts = ["<tool_", 'call>{"name": "f", ', '"arguments": {}}</tool_call>']
    request = chat(stream=True, tools=[tool], return_token_ids=True)
    chunks = await events(ScriptedEngine(texts), request, tools_in_prompt=False)
    told = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
    assert TOKENIZER.decode(told) == "".join(texts)


async def test_an_agent_may_call_functions_before_it_answers_in_its_format() -> None:
    """`structured_outputs` is what the whole answer matches, as in vLLM."""
    engine = ScriptedEngine(["{}"], ["{}"], ["{}"])
    made = GenerationService(engine, TOKENIZER, limits(tools_in_prompt=False), "tiny", grammars())
    tool = {"type": "function", "function": {"name": "f"}}
    form = {"response_format": {"type": "json_object"}}
    await made.respond(chat(tools=[tool], **form))
    await made.respond(chat(tools=[tool], tool_choice="none", **form))
    await made.respond(chat(tools=[tool], structured_outputs={"json_object": True}))
    assert ["<tool_call>" in (r.grammar or "") for r in engine.requests] == [True, False, False]


async def test_every_chunk_has_the_usage_so_far() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    options = {"continuous_usage_stats": True}
    call = 'x<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    engine = ScriptedEngine([call], [call])
    fields = {"n": 2, "temperature": 1, "tools": [tool], "stream_options": options}
    chunks = await events(engine, chat(stream=True, **fields), tools_in_prompt=False)
    assert all("usage" in chunk for chunk in chunks)


async def test_ignore_eos_leaves_only_the_requests_own_end_tokens() -> None:
    engine = ScriptedEngine(["a"], ["a"])
    await service(engine).respond(completion(ignore_eos=True, stop_token_ids=[7]))
    await service(engine).respond(completion(stop_token_ids=[7]))
    assert [r.end_token_ids for r in engine.requests] == [(7,), (314, 319, 7)]


async def test_answers_that_ignore_the_end_are_not_filled_with_end_of_text_tokens() -> None:
    engine = ScriptedEngine(["a"], ["a"], ["a"])
    for fields in ({"ignore_eos": True}, {"ignore_eos": True, "logits_eos_inf": False}, {}):
        await service(engine).respond(completion(**fields))
    assert [r.decoding.logits_eos_inf for r in engine.requests] == [True, False, False]


@pytest.mark.parametrize(
    ("refusal", "status"), [(QueueFullError("full"), 429), (EngineStoppedError("off"), 503)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_engine_has_its_status(
    refusal: EngineError, status: int, stream: bool
) -> None:
    with pytest.raises(RequestError) as caught:
        await service(ScriptedEngine(refusal=refusal)).respond(chat(stream=stream))
    assert caught.value.status == status
    assert caught.value.headers["Retry-After"]


async def test_a_failed_row_is_a_500_and_its_siblings_are_freed() -> None:
    engine = ScriptedEngine([None], ["a", EngineError("The model failed.")])
    with pytest.raises(RequestError, match="The model failed") as caught:
        await service(engine).respond(completion(n=2, temperature=1))
    assert caught.value.status == 500
    assert all(stream.aborted for stream in engine.streams)


async def test_a_stream_that_fails_tells_it_and_is_done() -> None:
    engine = ScriptedEngine(["abc", EngineError("The model failed.")])
    chunk, error = await events(engine, completion(stream=True))
    assert chunk["choices"][0]["text"] == "ab"
    assert error["error"]["code"] == 500
    assert engine.streams[0].aborted


async def test_an_unexpected_fault_is_a_500_that_tells_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RequestError) as caught:
        await service(ScriptedEngine(refusal=LookupError("secret path"))).respond(chat())
    assert caught.value.status == 500
    assert "secret" not in caught.value.message
    assert "secret path" in caplog.text


async def test_closing_a_stream_frees_its_rows() -> None:
    engine = ScriptedEngine(["abc", None], ["abc", None])
    tiny = service(engine)
    stream = await tiny.respond(completion(n=2, temperature=1, stream=True))
    assert tiny.active == 1
    await anext(stream)
    await stream.aclose()
    assert all(s.aborted for s in engine.streams)
    assert tiny.active == 0


async def test_closing_a_stream_that_was_never_read_frees_its_row() -> None:
    engine = ScriptedEngine([None])
    tiny = service(engine)
    stream = await tiny.respond(chat(stream=True))
    await stream.aclose()
    assert engine.streams[0].aborted
    assert tiny.active == 0


async def test_cancelling_a_request_frees_its_row_and_counts_it() -> None:
    engine = ScriptedEngine([None])
    closed = families.ERRORS.labels("tiny", "chat", "client_closed")
    before = closed._value.get()
    task = asyncio.create_task(service(engine).respond(chat()))
    while not engine.streams:  # noqa: ASYNC110  one turn of the loop is the event
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.streams[0].aborted
    assert closed._value.get() == before + 1


async def test_a_closed_service_refuses() -> None:
    tiny = service(ScriptedEngine())
    tiny.closed = "The server is stopping."
    with pytest.raises(RequestError, match="stopping") as caught:
        await tiny.respond(chat())
    assert caught.value.status == 503


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Long prompts are read when it is set."""
    goes_on = Event()
    read = TokenizerThread.run

    async def later(self: TokenizerThread, work: Any) -> Any:
        return await read(self, lambda tokenizer: goes_on.wait(60) and work(tokenizer))

    monkeypatch.setattr(TokenizerThread, "run", later)
    return goes_on


LONG = "x" * (MAX_CHARACTERS_AT_ONCE + 1)
LONG_TOOL = {"type": "function", "function": {"name": "f", "description": LONG}}


@pytest.mark.parametrize(
    "request_",
    [
        completion(prompt=LONG),
        completion(prompt=[LONG[1:], "x"]),
        completion(prompt="x", suffix=LONG),
        chat(messages=[{"role": "user", "content": LONG}]),
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": LONG}]}]),
        chat(messages=[{"role": "user", "content": "x", "name": LONG}]),
        chat(tools=[LONG_TOOL]),
        chat(chat_template_kwargs={"variable": {"of": [LONG]}}),
    ],
)
async def test_short_requests_do_not_wait_for_a_long_one(request_: Any, reading: Event) -> None:
    engine = ScriptedEngine(*[["ab"]] * 10)
    tiny = service(engine, max_model_len=100_000)
    long = asyncio.create_task(tiny.respond(request_))
    await tiny.respond(chat(messages=[{"role": "user", "content": LONG[:5000]}]))
    assert len(engine.requests) == 1
    reading.set()
    await long
    assert len(engine.requests) > 1


async def test_a_service_that_closes_while_a_prompt_is_read_refuses(reading: Event) -> None:
    engine = ScriptedEngine(["ab"])
    tiny = service(engine, max_model_len=100_000)
    long = asyncio.create_task(tiny.respond(completion(prompt=LONG)))
    await asyncio.sleep(0)
    tiny.closed = "The server is stopping."
    reading.set()
    with pytest.raises(RequestError, match="stopping"):
        await long
    assert not engine.requests
    assert tiny.active == 0


async def test_several_requests_are_answered_together() -> None:
    engine = ScriptedEngine(["a"], ["b", "c"])
    first, second = await service(engine).answer([completion(), chat()], "v1")
    assert first[0].text == "a"
    assert second[0].text == "bc"


async def test_one_failure_frees_all_of_them() -> None:
    engine = ScriptedEngine([EngineError("The model failed.")], [None])
    tiny = service(engine)
    with pytest.raises(RequestError):
        await tiny.answer([completion(), completion()], "v1")
    assert all(s.aborted for s in engine.streams)
    assert tiny.active == 0


async def test_a_requests_time_begins_when_it_comes() -> None:
    engine, release = ScriptedEngine(["a"]), threading.Event()
    made = service(engine, max_model_len=20_000)
    waiting = asyncio.create_task(made.tokenizer_thread.run(lambda _: release.wait()))
    answer = asyncio.create_task(made.respond(completion(prompt="a " * 5000, timeout=50)))
    await asyncio.sleep(0)
    then = time.monotonic()
    while time.monotonic() == then:
        pass
    release.set()
    await asyncio.gather(waiting, answer)
    (request,) = engine.requests
    assert request.deadline is not None
    assert request.deadline <= then + 50


async def test_a_request_id_of_the_client_is_used() -> None:
    answer = await service(ScriptedEngine(["a"])).respond(chat(request_id="mine"))
    assert answer.id == "chatcmpl-mine"


async def test_content_parts_are_joined_and_extra_fields_reach_the_template() -> None:
    engine = ScriptedEngine(["a"], ["a"])
    tiny = service(engine)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await tiny.respond(chat(messages=[{"role": "user", "content": parts}]))
    await tiny.respond(chat(messages=[{"role": "user", "content": "one\ntwo", "extra": 1}]))
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids
