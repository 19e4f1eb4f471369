"""What request fields say about an answer's form becomes a grammar, or a refusal in time."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.openai.engine import limits
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Grammars
from vdiff_kserve.models import load_tokenizer
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.protocol import CompletionRequest
from vdiff_kserve.openai.structured import (
    COMPILING_THREADS,
    AnswerFormat,
    FormatCompiler,
    answer_format,
    json_grammar,
)

TOKENIZER = load_tokenizer(EMBEDDED)
ENDLESS = json_grammar(
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/node"}, "or": {"type": "string"}},
                "required": ["next"],
            }
        },
    }
)
"""Nothing matches it, which takes a while to find out."""


def compiled(**fields: Any) -> Any:
    """What a request's answer must match, ready to be asked about texts."""
    asked = answer_format(CompletionRequest.model_validate({"prompt": "x", **fields}), limits())
    if asked is None:
        return None
    return grammars().compile(asked.grammar).matcher


def grammars() -> Grammars:
    ids = [TOKENIZER.convert_tokens_to_ids(each) for each in ("<|endoftext|>", "<|eot_id|>")]
    return Grammars(TOKENIZER, len(TOKENIZER), ids, 200)


def accepts(matcher: Any, text: str) -> bool:
    copy = matcher.deep_copy()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()


def test_a_request_that_says_nothing_may_answer_anything() -> None:
    assert compiled() is None
    assert compiled(response_format={"type": "text"}) is None


def test_json_is_written_as_pythons_json_does() -> None:
    matcher = compiled(response_format={"type": "json_object"})
    value = {"a": [1, {"b": None}], "c": "d"}
    assert accepts(matcher, json.dumps(value))
    assert not accepts(matcher, json.dumps(value, separators=(",", ":")))
    assert not accepts(matcher, json.dumps(value, indent=1))
    assert not accepts(matcher, "[]")


def test_json_can_be_written_without_spaces_or_with_others() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"json": schema, "disable_additional_properties": True}
    tight = compiled(structured_outputs=asked | {"disable_any_whitespace": True})
    assert accepts(tight, '{"a":1}')
    assert not accepts(tight, '{"a": 1}')
    loose = compiled(structured_outputs=asked | {"whitespace_pattern": r"[ \n]*"})
    assert accepts(loose, '{"a":1}')
    assert accepts(loose, '{\n "a":  1\n}')


def test_other_properties_can_be_forbidden_unless_the_schema_allows_them() -> None:
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}}
    open_one = inner | {"additionalProperties": {"type": "integer"}}
    schema = {"type": "object", "properties": {"a": inner, "b": open_one}}
    for closed in (False, True):
        asked = {"json": schema, "disable_additional_properties": closed}
        matcher = compiled(structured_outputs=asked)
        assert accepts(matcher, '{"z": 1}') is not closed
        assert accepts(matcher, '{"a": {"z": 1}}') is not closed
        assert accepts(matcher, '{"b": {"z": 1}}')


def test_a_choice_may_hold_any_text() -> None:
    choices = ['say "hi"', "a\\b\nc", "größer", "|"]
    matcher = compiled(structured_outputs={"choice": choices})
    for choice in choices:
        assert accepts(matcher, choice)
    assert not accepts(matcher, "say")


async def test_what_takes_too_long_to_compile_is_refused_in_time() -> None:
    compiler = FormatCompiler(grammars(), seconds=0.001)
    with pytest.raises(RequestError, match=r"too complex to compile in 0.001 s") as caught:
        await compiler.compile(AnswerFormat("response_format", ENDLESS), 100)
    assert caught.value.status == 400
    assert caught.value.param == "response_format"


async def test_waiting_for_other_formats_is_not_taking_too_long() -> None:
    known, shared = AnswerFormat("response_format", json_grammar({"type": "object"})), grammars()
    await FormatCompiler(shared, seconds=60).compile(known, 100)
    compiler, release = FormatCompiler(shared, seconds=0.2), threading.Event()
    busy = [compiler._threads.submit(release.wait) for _ in range(COMPILING_THREADS)]
    try:
        await compiler.compile(known, 100)
        with pytest.raises(RequestError, match="other formats are being compiled") as caught:
            await compiler.compile(AnswerFormat("response_format", json_grammar({})), 100)
    finally:
        release.set()
    assert caught.value.status == 503
    assert caught.value.headers == {"Retry-After": "1"}
    assert all(each.result(timeout=60) for each in busy)


async def test_an_impossible_schema_is_refused() -> None:
    compiler = FormatCompiler(grammars(), seconds=30)
    with pytest.raises(RequestError, match="no text of at most 200 tokens"):
        await compiler.compile(AnswerFormat("tools", ENDLESS), 100)


async def test_the_shortest_text_is_looked_for_harder_where_room_is_short() -> None:
    """The first way to close is not the shortest: the alternative behind it is."""
    schema = {"anyOf": [{"type": "string", "minLength": 80}, {"enum": [1234567, 12]}]}
    asked = AnswerFormat("structured_outputs", json_grammar(schema))
    compiler = FormatCompiler(grammars(), seconds=30)
    await compiler.compile(asked, 2)
    compiler.check_room(asked, 2, "max_tokens")
    with pytest.raises(RequestError, match="room for 2 tokens") as caught:
        compiler.check_room(asked, 1, "max_tokens")
    assert caught.value.param == "max_tokens"


async def test_a_model_without_grammars_refuses_them() -> None:
    compiler = FormatCompiler(None, seconds=1)
    with pytest.raises(RequestError, match="tokenizer cannot be used"):
        await compiler.compile(AnswerFormat("tools", ENDLESS), 10)
