"""Which constraints a request's fields come to, and which are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.openai.engine import EOS, EOT, MASK, TOKENIZER, ScriptedEngine, service
from vdiff_kserve.openai.constraints import constraints_of
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.protocol import CompletionRequest
from vdiff_kserve.sampler import Constraints

VOCAB = 320


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def constraints(**fields: Any) -> Constraints | None:
    request = CompletionRequest.model_validate({"prompt": "x"} | fields)
    return constraints_of(
        request,
        TOKENIZER,
        vocab_size=VOCAB,
        never_written=frozenset({MASK}),
        end_token_ids=(EOS, EOT),
        max_tokens=16,
    )


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        constraints(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_request_that_asks_for_nothing_has_none() -> None:
    assert constraints() is None
    assert constraints(
        logit_bias={}, bad_words=[], min_tokens=0, presence_penalty=0, frequency_penalty=None,
        repetition_penalty=1,
    ) is None  # fmt: skip


def test_fields_become_plain_data() -> None:
    assert constraints(
        logit_bias={"5": 200, "7": -1.5}, allowed_token_ids=[5, 7], min_tokens=3,
        presence_penalty=1, frequency_penalty=-2, repetition_penalty=1.2,
    ) == Constraints(
        logit_bias=((5, 100.0), (7, -1.5)),
        allowed_token_ids=(5, 7),
        min_tokens=3,
        end_token_ids=(EOS, EOT),
        presence_penalty=1.0,
        frequency_penalty=-2.0,
        repetition_penalty=1.2,
    )  # fmt: skip


def test_bad_words_are_banned_with_and_without_the_space_before_them() -> None:
    """With it only where that makes another first token and no more of them."""
    (bare,) = constraints(bad_words=["xyz"]).bad_words
    assert bare == ids("xyz")
    assert constraints(bad_words=[" q", "q", "q"]).bad_words == (ids("q"),)


def test_a_word_whose_space_is_part_of_its_first_token_is_banned_twice() -> None:
    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [50 + text.startswith(" "), 60]

    asked = constraints_of(
        CompletionRequest(prompt="x", bad_words=["word"]),
        Words(),
        vocab_size=VOCAB,
        never_written=frozenset(),
        end_token_ids=(),
        max_tokens=4,
    )
    assert asked.bad_words == ((50, 60), (51, 60))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("presence_penalty", 3, "presence_penalty must be in [-2, 2], got 3.0"),
        ("presence_penalty", float("nan"), "[-2, 2]"),
        ("frequency_penalty", -2.1, "frequency_penalty must be in [-2, 2], got -2.1"),
        ("repetition_penalty", 0, "repetition_penalty must be a number greater than zero, got 0.0"),
        ("repetition_penalty", float("inf"), "greater than zero"),
        ("repetition_penalty", float("nan"), "greater than zero"),
        ("min_tokens", -1, "min_tokens must be in [0, 16]"),
        ("min_tokens", 17, "min_tokens must be in [0, 16]"),
        ("logit_bias", {"x": 1}, "logit_bias must be keyed by token ids"),
        ("logit_bias", {"320": 1}, "[0, 319]"),
        ("logit_bias", {"-1": 1}, "[0, 319]"),
        ("logit_bias", {"1": float("nan")}, "numbers"),
        ("allowed_token_ids", [], "allowed_token_ids must not be empty"),
        ("allowed_token_ids", [1, 320], "[0, 319]"),
        ("bad_words", ["a", ""], "bad_words cannot contain an empty string"),
        ("bad_words", [chr(300 + i) for i in range(129)], "at most 128"),
        ("bad_words", ["x" * 1025], "at most 1024 characters"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, words: str) -> None:
    error = refusal(**{field: value})
    assert error.param == field
    assert words in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [MASK]},
        {"allowed_token_ids": [EOS, EOT, MASK], "min_tokens": 1},
        {"allowed_token_ids": ids("x"), "bad_words": ["x"]},
        {"allowed_token_ids": ids("xy"), "bad_words": ["xy"]},
    ],
)
def test_what_leaves_no_token_is_refused(fields: dict[str, Any]) -> None:
    assert refusal(**fields).param == "allowed_token_ids"


def test_a_token_outside_the_bad_words_is_enough() -> None:
    assert constraints(allowed_token_ids=ids("xyz"), bad_words=["xy"]) is not None
    assert constraints(allowed_token_ids=[EOS], min_tokens=0) is not None


async def test_the_engine_gets_them_with_the_ends_of_this_request() -> None:
    engine = ScriptedEngine(["a"], ["a"], ["a"])
    tiny = service(engine)
    for fields in ({"stop_token_ids": [7]}, {"ignore_eos": True, "stop_token_ids": [7]}):
        request = CompletionRequest(prompt="hi", min_tokens=2, max_tokens=4, **fields)
        await tiny.respond(request)
    await tiny.respond(CompletionRequest(prompt="hi"))
    asked = [request.decoding.constraints for request in engine.requests]
    assert asked[0] == Constraints(min_tokens=2, end_token_ids=(EOS, EOT, 7))
    assert asked[1] == Constraints(min_tokens=2, end_token_ids=(7,))
    assert asked[2] is None


async def test_a_stop_string_does_not_end_an_answer_within_min_tokens() -> None:
    request = CompletionRequest(prompt="hi", stop="b", min_tokens=3, max_tokens=9)
    answer = await service(ScriptedEngine(["ab", "aab", "x"])).respond(request)
    assert answer.choices[0].text == "abaa"


async def test_an_end_token_that_may_never_be_written_does_not_count_as_left() -> None:
    fields = {"prompt": "hi", "allowed_token_ids": [EOS]}
    with pytest.raises(RequestError, match="allowed_token_ids"):
        await service(ScriptedEngine()).respond(CompletionRequest(logits_eos_inf=True, **fields))
    await service(ScriptedEngine(["a"])).respond(CompletionRequest(**fields))
