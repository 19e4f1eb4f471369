"""Streaming text: any way of cutting an answer into pieces gives the same text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.server.checkpoint import SPECIAL_TOKENS, make_tokenizer
from vdiff_kserve.openai.text import AnswerText, Detokenizer

TOKENIZER = make_tokenizer()
BYTE_IDS = st.integers(0, 255)


def pieces_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    return [ids[a:b] for a, b in pairwise(bounds)]


def run(text: AnswerText, pieces: list[list[int]]) -> list[str]:
    sent = []
    for piece in pieces:
        sent.append(text.add(piece))
        if text.stop_string is not None:
            break
    return [*sent, text.finish()]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_split_of_any_text_streams_to_the_same_text(text: str, cuts: list[int]) -> None:
    ids = encode(text)
    sent = run(AnswerText(Detokenizer(TOKENIZER)), pieces_of(ids, cuts))
    assert "".join(sent) == TOKENIZER.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in sent)


@given(st.lists(BYTE_IDS, max_size=60), st.lists(st.integers(0, 1000)))
def test_any_split_of_any_bytes_streams_to_the_same_text(ids: list[int], cuts: list[int]) -> None:
    sent = run(AnswerText(Detokenizer(TOKENIZER)), pieces_of(ids, cuts))
    assert "".join(sent) == TOKENIZER.decode(ids)


@given(
    st.text("abcé世", max_size=40),
    st.lists(st.text("abcé世", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 1000)),
)
def test_any_split_stops_at_the_same_place(text: str, stops: list[str], cuts: list[int]) -> None:
    ids = encode(text)
    whole = AnswerText(Detokenizer(TOKENIZER), stops)
    split = AnswerText(Detokenizer(TOKENIZER), stops)
    expected = "".join(run(whole, [ids]))
    assert "".join(run(split, pieces_of(ids, cuts))) == expected
    assert split.stop_string == whole.stop_string
    assert split.num_tokens == whole.num_tokens
    assert not any(stop in expected for stop in stops)
    if whole.stop_string is None:
        assert expected == text
    else:
        assert text.startswith(expected + whole.stop_string)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    text = AnswerText(Detokenizer(TOKENIZER), ["long stops", "op"])
    assert "".join(run(text, [encode("a long stops")])) == "a long st"
    assert text.stop_string == "op"


def test_of_two_that_end_together_the_longer_wins() -> None:
    text = AnswerText(Detokenizer(TOKENIZER), ["op", "stop"])
    assert "".join(run(text, [encode("a stop.")])) == "a "


def test_a_possible_stop_string_is_kept_back_until_it_is_none() -> None:
    text = AnswerText(Detokenizer(TOKENIZER), ["###"])
    assert text.add(encode("ab##")) == "ab"
    assert text.add(encode("c#")) == "##c"
    assert text.finish() == "#"


def test_the_last_character_waits_for_the_end() -> None:
    text = AnswerText(Detokenizer(TOKENIZER))
    assert text.add(encode("abc")) == "ab"
    assert text.add([]) == ""
    assert text.finish() == "c"


def test_half_a_character_waits_while_the_text_before_it_goes_out() -> None:
    text = AnswerText(Detokenizer(TOKENIZER))
    ids = encode("abc世")
    assert text.add(ids[:-1]) == "ab"
    assert text.add(ids[-1:]) == "c"
    assert text.finish() == "世"


def test_an_answer_that_ends_within_a_character_says_so() -> None:
    text = AnswerText(Detokenizer(TOKENIZER))
    assert text.add(encode("a世")[:-1]) + text.finish() == "a\ufffd"


def test_the_stop_string_may_be_the_end_of_the_text() -> None:
    for ids in ([encode("a stop.")], [[i] for i in encode("a stop.")]):
        text = AnswerText(Detokenizer(TOKENIZER), ["op"], include_stop=True)
        assert "".join(run(text, ids)) == "a stop"
        assert text.stop_string == "op"


@given(st.lists(st.integers(0, 1000)), st.integers(0, 9))
def test_stop_strings_do_not_count_within_the_first_tokens(cuts: list[int], least: int) -> None:
    """A match counts when it is complete behind them, wherever it began."""
    ids = encode("xbxbxbx")
    text = AnswerText(Detokenizer(TOKENIZER), ["xb"], min_tokens=least)
    sent = "".join(run(text, pieces_of(ids, cuts)))
    ends = [end for end in (2, 4, 6) if end > least]
    assert sent == ("xbxbxbx"[: ends[0] - 2] if ends else "xbxbxbx")
    assert text.num_tokens == (ends[0] if ends else 7)


def test_special_tokens_appear_when_they_are_asked_for() -> None:
    ids = [*encode("ab"), TOKENIZER.convert_tokens_to_ids(SPECIAL_TOKENS[0]), *encode("cd")]
    text = AnswerText(Detokenizer(TOKENIZER, skip_special_tokens=False))
    assert "".join(run(text, [[i] for i in ids])) == f"ab{SPECIAL_TOKENS[0]}cd"


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_never_appear(token: str) -> None:
    ids = [*encode("ab"), TOKENIZER.convert_tokens_to_ids(token), *encode("cd")]
    assert "".join(run(AnswerText(Detokenizer(TOKENIZER)), [[i] for i in ids])) == "abcd"


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with a way of decoding of its own."""

    def _decode(self, *arguments: Any, **options: Any) -> str:
        return super()._decode(*arguments, **options).upper()


@pytest.mark.parametrize(("kind", "text"), [(PreTrainedTokenizerFast, "a ."), (Shouting, "A .")])
def test_a_tokenizer_decodes_its_own_way_but_cleans_nothing_up(
    kind: type[PreTrainedTokenizerFast], text: str
) -> None:
    words = Tokenizer(WordLevel({"a": 0, ".": 1}, unk_token="."))
    tokenizer = kind(tokenizer_object=words, clean_up_tokenization_spaces=True)
    assert "".join(run(AnswerText(Detokenizer(tokenizer)), [[0], [1]])) == text


def test_a_space_before_a_piece_is_kept_where_only_the_text_loses_its_first() -> None:
    words = Tokenizer(WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert "".join(run(AnswerText(Detokenizer(tokenizer)), [[0], [1], [0]])) == "a b a"
