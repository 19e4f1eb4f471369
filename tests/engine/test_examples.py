"""Examples of regular expressions match them, and are found wherever a grammar has some."""

from __future__ import annotations

import json
import re

import pytest
from llguidance import LLMatcher

from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Grammars
from vdiff_kserve.engine.examples import example, examples
from vdiff_kserve.models import load_tokenizer

PATTERNS = [
    r"\w+@\w+\.com\n",
    r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
    r"https?://[^\s/$.?#].[^\s]*",
    r".+\.com",
    r"(?s).*Answer: (yes|no)",
    r"(?:(?P<sign>[+-])?\d+(\.\d+)?){1,2}",
    r"[^\W\d_]{3}-[\]x^-]+\x41\u00e9",
    r"(25[0-5]|2[0-4]\d|[1-9]?\d)(\.\d{1,3}){3}",
    r"[Ѐ-ӿ]+ [\u0400-\u04FF]{2}",
    r"a??b*?(|c)d+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_example_matches(pattern: str) -> None:
    text = example(pattern)
    assert text is not None
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "pattern", [r"(a", r"a)", r"x{3000}", r"(a{900}){900}", r"[a&&[b]]", r"\UFFFFFFFF"]
)
def test_what_is_not_understood_has_none(pattern: str) -> None:
    assert example(pattern) is None


def test_digits_behind_a_code_are_members_of_their_own() -> None:
    """They would be a code that no character has."""
    assert example(r"[\xFFFFFFFF]") == "F"


def test_properties_have_members() -> None:
    assert example(r"\p{Lu}\pN[\p{L} ]") == "A0a"


def test_examples_are_found_in_schemas_and_grammars() -> None:
    schema = {"properties": {"a": {"pattern": "x+@"}, "b": {"patternProperties": {'"y': {}}}}}
    assert examples(LLMatcher.grammar_from_json_schema(schema)) == ["x@", '"y', '\\"y']
    lark = f"start: /a\\/b+/ other\nother: %json {json.dumps(schema)}\nthird: %json {{\n}}"
    assert examples(lark) == ["a/b", "x@", '"y', '\\"y']


def test_a_grammar_with_many_has_some() -> None:
    lark = "\n".join(f"rule_{i}: /{'a' * i}+/" for i in range(1, 500))
    assert len(examples(lark)) == 32


@pytest.mark.parametrize("pattern", [*PATTERNS[:5], r"\w+\s\w+\s\w+@\w+"])
def test_with_them_an_ending_is_found(pattern: str) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    grammars = Grammars(tokenizer, len(tokenizer), [end], 60)
    text = tokenizer.decode(grammars.compile(LLMatcher.grammar_from_regex(pattern)).shortest)
    assert re.fullmatch(pattern, text)
    schema = {
        "type": "array",
        "items": {"type": "string", "pattern": f"^{pattern}$"},
        "minItems": 2,
    }
    if not pattern.startswith("(?s)"):
        found = grammars.compile(LLMatcher.grammar_from_json_schema(schema)).shortest
        assert all(re.fullmatch(pattern, each) for each in json.loads(tokenizer.decode(found)))
