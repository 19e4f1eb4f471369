"""Calls are found in an answer's text however it is cut, and everything else stays text."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiff_kserve.openai.tool_parsers import Found, ParserName, make_parser

FUNCTIONS = {"weather", "time", 'odd "name"'}


def whole(found: list[Found]) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and each call with its arguments."""
    text, calls = "", []
    for each in found:
        if each.call is None:
            text += each.text
        elif each.name is not None:
            assert each.call == len(calls)
            assert each.call_id
            calls.append([each.name, ""])
        else:
            assert each.call == len(calls) - 1
            calls[-1][1] += each.text
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def parse(name: ParserName, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = make_parser(name, FUNCTIONS)
    found = [each for piece in pieces for each in parser.add(piece)]
    return whole([*found, *parser.finish()])


def call_of(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.dictionaries(st.text(max_size=5), ARGUMENTS)),
    min_size=1,
    max_size=3,
)


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


@given(CALLS, st.lists(st.integers(0, 10_000)))
def test_hermes_calls_are_found_however_the_text_is_cut(
    calls: list[tuple[str, Any]], places: list[int]
) -> None:
    text = "Let me see. " + hermes(*(call_of(*each) for each in calls))
    assert parse("hermes", cut(text, places)) == ("Let me see.", calls)


@given(CALLS, st.lists(st.integers(0, 10_000)))
def test_json_calls_are_found_however_the_text_is_cut(
    calls: list[tuple[str, Any]], places: list[int]
) -> None:
    text = f"[{', '.join(call_of(*each) for each in calls)}]"
    assert parse("json", cut(text, places)) == ("", calls)


@given(st.text(alphabet='<tool_ca>/{}[]"nm:, \n', max_size=60), st.lists(st.integers(0, 100)))
def test_text_that_is_no_call_is_told_whole(text: str, places: list[int]) -> None:
    for name in ("hermes", "json"):
        told, calls = parse(name, cut(text, places))
        assert calls == []
        assert told.split() == text.split()


@pytest.mark.parametrize("key", ["arguments", "parameters"])
@pytest.mark.parametrize("name", ["hermes", "json"])
def test_arguments_go_by_both_names(name: ParserName, key: str) -> None:
    call = call_of("weather", {"city": "Paris"}, key)
    text = hermes(call) if name == "hermes" else call
    assert parse(name, list(text)) == ("", [("weather", {"city": "Paris"})])


@pytest.mark.parametrize("name", ["hermes", "json"])
def test_a_call_with_its_arguments_first_is_read_too(name: ParserName) -> None:
    call = '{"arguments": {"city": "Rome"}, "name": "weather"}'
    text = hermes(call) if name == "hermes" else f"[{call}]"
    assert parse(name, list(text)) == ("", [("weather", {"city": "Rome"})])


@pytest.mark.parametrize("name", ["hermes", "json"])
def test_functions_that_were_not_offered_stay_text(name: ParserName) -> None:
    call = call_of("rm", {"path": "/"})
    text = hermes(call) if name == "hermes" else call
    told, calls = parse(name, list(text))
    assert calls == []
    assert call in told


@pytest.mark.parametrize("name", ["hermes", "json"])
@pytest.mark.parametrize("given", [["weather"], {"a": 1}, None, 3])
def test_a_name_that_is_no_text_is_no_call(name: ParserName, given: Any) -> None:
    call = json.dumps({"arguments": {}, "name": given})
    text = hermes(call) if name == "hermes" else call
    told, calls = parse(name, list(text))
    assert calls == []
    assert call in told


def test_name_and_arguments_are_told_as_soon_as_they_are_certain() -> None:
    parser = make_parser("hermes", FUNCTIONS)
    assert parser.add('<tool_call>\n{"name": "weather", "argu') == []
    (begun, first) = parser.add('ments": {"city": "Pa')
    assert (begun.name, begun.text, first.text) == ("weather", "", '{"city": "Pa')
    (more,) = parser.add('ris"}')
    assert (more.call, more.text) == (0, 'ris"}')
    assert parser.add("}\n</tool_call>") == []
    assert parser.finish() == []


def test_the_beginning_of_a_tag_is_held_back_until_it_is_none() -> None:
    parser = make_parser("hermes", FUNCTIONS)
    assert [each.text for each in parser.add("1 <tool")] == ["1"]
    assert [each.text for each in parser.add("box>")] == [" <toolbox>"]


def test_text_behind_the_calls_is_told() -> None:
    text = hermes(call_of("time", {})) + "\nThat is it."
    assert parse("hermes", list(text)) == ("\nThat is it.", [("time", {})])


def test_a_closing_tag_inside_an_argument_does_not_close_the_call() -> None:
    arguments = {"city": "</tool_call> <tool_call>"}
    assert parse("hermes", list(hermes(call_of("weather", arguments)))) == (
        "", [("weather", arguments)],
    )  # fmt: skip
