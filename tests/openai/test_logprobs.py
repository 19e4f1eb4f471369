"""Log probabilities and token ids in answers, whole and streamed, in both endpoints' shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.openai.engine import EOS, TOKENIZER, ScriptedEngine, service
from vdiff_kserve.engine import TokenLogprob
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.limits import wanted_logprobs
from vdiff_kserve.openai.logprobs import TokenTexts, completion_logprobs
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "hi"}]
A, B, C = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc")


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": MESSAGES} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi"} | fields)


async def chunks(engine: ScriptedEngine, request: Any) -> list[dict[str, Any]]:
    stream = await service(engine).respond(request)
    return [json.loads(event[6:]) async for event in stream if "[DONE]" not in event]


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (chat(), None),
        (chat(logprobs=False, top_logprobs=0), None),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=None), 0),
        (chat(logprobs=True, top_logprobs=20), 20),
        (completion(), None),
        (completion(logprobs=0), 0),
        (completion(logprobs=5), 5),
    ],
)
def test_how_many_are_told(request_: Any, count: int | None) -> None:
    assert wanted_logprobs(request_) == count


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(logprobs=False, top_logprobs=-1), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "logprobs"),
        (chat(logprobs=True, top_logprobs=-1), "logprobs"),
        (completion(logprobs=21), "logprobs"),
        (completion(logprobs=-1), "logprobs"),
    ],
)
def test_what_there_is_not_is_refused(request_: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        wanted_logprobs(request_)
    assert caught.value.param == param


def test_the_refusal_names_the_field_that_has_the_number() -> None:
    for request_, field in (
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (completion(logprobs=21), "logprobs"),
    ):
        with pytest.raises(RequestError, match=f"^{field} must be an integer from 0 to 20, got 21"):
            wanted_logprobs(request_)


async def test_a_chat_tells_each_token_and_its_rivals() -> None:
    engine = ScriptedEngine(["bc"], finish_reason="stop")
    answer = await service(engine).respond(chat(logprobs=True, top_logprobs=1))
    parsed = ChatCompletion.model_validate_json(answer.model_dump_json())
    told = parsed.choices[0].logprobs.content
    assert [each.token for each in told] == ["b", "c", "<|endoftext|>"]
    assert len(told) == parsed.usage.completion_tokens
    assert [each.logprob for each in told] == [-1.5] * 3
    assert told[0].bytes == [98]
    assert [(t.token, t.logprob) for t in told[0].top_logprobs] == [("a", -0.5)]


async def test_a_completion_tells_the_chosen_token_beside_the_likeliest() -> None:
    answer = await service(ScriptedEngine(["b", "c"])).respond(completion(logprobs=1))
    parsed = Completion.model_validate_json(answer.model_dump_json())
    told = parsed.choices[0].logprobs
    assert told.tokens == ["b", "c"]
    assert told.token_logprobs == [-1.5, -1.5]
    assert told.text_offset == [0, 1]
    assert told.top_logprobs[0] == {"b": -1.5, "a": -0.5}
    answer = await service(ScriptedEngine(["b"])).respond(completion(logprobs=0))
    assert answer.choices[0].logprobs.top_logprobs == [{"b": -1.5}]


async def test_without_the_field_there_is_null_and_no_token_ids() -> None:
    answer = await service(ScriptedEngine(["b"])).respond(chat())
    choice = json.loads(answer.model_dump_json())["choices"][0]
    assert choice["logprobs"] is None
    assert "token_ids" not in choice


async def test_a_stream_tells_every_token_once_with_its_text() -> None:
    """Also those whose text is held back: half characters, possible stop strings."""
    script = ["b", "世"[:1], "#", "c"]
    request = dict(stream=True, stop="##", return_token_ids=True)
    events = await chunks(
        ScriptedEngine(script, finish_reason="stop"),
        chat(logprobs=True, top_logprobs=2, **request),
    )
    for event in events:
        ChatCompletionChunk.model_validate(event)
    told = [t for e in events for t in e["choices"][0]["logprobs"]["content"]]
    ids = [i for e in events for i in e["choices"][0]["token_ids"]]
    expected = [*TOKENIZER.encode("".join(script), add_special_tokens=False), EOS]
    assert ids == expected
    assert b"".join(bytes(t["bytes"]) for t in told[:-1]).decode() == "".join(script)
    assert [e.get("prompt_token_ids") is not None for e in events] == [True] + [False] * (
        len(events) - 1
    )
    events = await chunks(ScriptedEngine(script), completion(logprobs=1, **request))
    offsets = [o for e in events for o in e["choices"][0]["logprobs"]["text_offset"]]
    lengths = [len(t) for e in events for t in e["choices"][0]["logprobs"]["tokens"]]
    assert offsets == [sum(lengths[:i]) for i in range(len(lengths))]
    assert len(offsets) == len(expected) - 1
    prompts = [event["choices"][0].get("prompt_token_ids") for event in events]
    hi = TOKENIZER.encode("hi", add_special_tokens=False)
    assert prompts == [hi] + [None] * (len(events) - 1)


async def test_token_ids_end_with_the_stop_string() -> None:
    """As many as the usage counts."""
    request = completion(stop="b", return_token_ids=True, logprobs=0)
    answer = await service(ScriptedEngine(["a", "abca", None])).respond(request)
    choice = answer.choices[0]
    assert choice.token_ids == [A, A, B]
    assert choice.logprobs.tokens == ["a", "a", "b"]
    assert answer.usage.completion_tokens == 3
    assert choice.prompt_token_ids == TOKENIZER.encode("hi", add_special_tokens=False)


async def test_each_prompt_has_its_own_token_ids() -> None:
    engine = ScriptedEngine(["a"], ["b"], ["c"], ["a"])
    request = completion(prompt=[[A], [B, C]], n=2, temperature=1, return_token_ids=True)
    answer = await service(engine).respond(request)
    assert [c.prompt_token_ids for c in answer.choices] == [[A], [A], [B, C], [B, C]]
    assert [c.token_ids for c in answer.choices] == [[A], [B], [C], [A]]


async def test_token_ids_in_place_of_texts() -> None:
    request = completion(logprobs=1, return_tokens_as_token_ids=True)
    answer = await service(ScriptedEngine(["b"])).respond(request)
    told = answer.choices[0].logprobs
    assert told.tokens == [f"token_id:{B}"]
    assert told.top_logprobs == [{f"token_id:{B}": -1.5, f"token_id:{A}": -0.5}]


def test_parts_of_characters_have_their_own_bytes() -> None:
    texts = TokenTexts(TOKENIZER)
    ids = TOKENIZER.encode("é世", add_special_tokens=False)
    told = [texts.scored(TokenLogprob(token, -1e9, 1, ())) for token in ids]
    assert b"".join(each.utf8 for each in told) == "é世".encode()
    assert {each.logprob for each in told} == {-9999.0}


def test_of_tokens_with_the_same_text_the_chosen_one_is_told() -> None:
    texts = TokenTexts(TOKENIZER)
    first, second = TOKENIZER.encode("é", add_special_tokens=False)
    told = texts.scored(TokenLogprob(second, -3.0, 2, ((first, -1.0), (second, -3.0))))
    assert completion_logprobs([told]).top_logprobs == [{"\ufffd": -3.0}]


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason"),
    [
        ({}, "ab", None),
        ({"include_stop_str_in_output": True}, "ab", None),
        ({"skip_special_tokens": False}, "ab", None),
        (
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            "ab<|endoftext|>",
            None,
        ),
        ({"stop": "b"}, "a", "b"),
        ({"stop": "b", "include_stop_str_in_output": True}, "ab", "b"),
    ],
)
async def test_what_ends_the_text(
    fields: dict[str, Any], text: str, stop_reason: str | None
) -> None:
    engine = ScriptedEngine(["ab"], finish_reason="stop")
    answer = await service(engine).respond(completion(**fields))
    assert answer.choices[0].text == text
    assert answer.choices[0].stop_reason == stop_reason
    assert answer.usage.completion_tokens == (2 if stop_reason else 3)
