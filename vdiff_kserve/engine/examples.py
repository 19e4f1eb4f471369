"""A short text for each regular expression of a grammar.

The search for endings sees a grammar from outside: which tokens may come next. Of `.+@x` it cannot
see that only `@` brings the end nearer, since anything may come all along. So it is told a text
that each regular expression matches, read off the expression itself. Whether it fits where the
search stands, llguidance decides: a wrong example costs a try.
"""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Iterator
from typing import Any

MEMBERS = string.ascii_letters + string.digits + string.punctuation + string.whitespace + "éяα一"
"""Where a member of a class of characters is looked for."""
PROPERTIES = {"L": "a", "Lu": "A", "N": "0", "Nd": "0", "P": ".", "Z": " ", "S": "+"}
"""A member of Unicode's general categories; of others, a letter is tried."""
LARK_REGEX = re.compile(r"/((?:[^/\\\n]|\\.)+)/")
PROPERTY = re.compile(r"\\[pP](?:\{\^?(\w+)[^}]*\}|(\w))")
ESCAPE = re.compile(r"\\(?:x\{[^}]*\}|x..|u\{[^}]*\}|u.{4}|U.{8}|.)", re.DOTALL)
CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
SET_OPERATION = re.compile(r"(?<!\\)\[|--|&&|\|\||~~")
"""What Rust reads in a class and Python does not."""
GROUP = re.compile(r"\?(?:P?<\w+>|[a-zA-Z-]*:|[a-zA-Z-]+(?=\)))")
QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d+)(?:,\d*)?\})\??")
LONGEST = 1000
MOST = 32
"""Examples of one grammar: each is tried wherever the search stands."""


def examples(grammar: str) -> list[str]:
    """Short texts for the regular expressions of a grammar, as far as they can be read.

    Args:
        grammar: as llguidance reads it: Lark, or JSON with Lark and JSON schemas.
    """
    found: dict[str, None] = {}
    for pattern in _patterns(grammar):
        text = example(pattern)
        if text:
            found |= dict.fromkeys((text, json.dumps(text, ensure_ascii=False)[1:-1]))
        if len(found) >= MOST:
            break
    return list(found)


def _patterns(grammar: str) -> Iterator[str]:
    parsed = _json(grammar)
    if not isinstance(parsed, dict):
        yield from _of_lark(grammar)
        return
    for part in parsed.get("grammars", ()):
        yield from _of_lark(part.get("lark_grammar") or "")
        yield from _of_schema(part.get("json_schema"))


def _of_lark(grammar: str) -> Iterator[str]:
    for found in LARK_REGEX.finditer(grammar):
        yield found[1]
    for line in grammar.splitlines():
        _, directive, schema = line.partition("%json ")
        if directive:
            yield from _of_schema(_json(schema))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # Lark, or a schema that is written over several lines
        return None


def _of_schema(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _of_schema(each)
    elif isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        if isinstance(schema.get("patternProperties"), dict):
            yield from schema["patternProperties"]
        for each in schema.values():
            yield from _of_schema(each)


def example(pattern: str) -> str | None:
    """A text that a regular expression matches, mostly the shortest; None where it is too long or
    not understood."""
    reader = _Reader(pattern)
    try:
        text = reader.alternatives()
    except (ValueError, OverflowError, RecursionError, re.error):
        return None
    return text if reader.is_at_end() and len(text) <= LONGEST else None


class _Reader:
    """Reads a regular expression from left to right, in the syntax that Rust and Python share."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def is_at_end(self) -> bool:
        return self._at >= len(self._pattern)

    def alternatives(self) -> str:
        """The shortest of the texts that `|` separates."""
        texts = [self._sequence()]
        while self._skip("|"):
            texts.append(self._sequence())
        return min(texts, key=len)

    def _sequence(self) -> str:
        text = ""
        while not self.is_at_end() and self._pattern[self._at] not in "|)":
            text += self._repeated(self._atom())
            if len(text) > LONGEST:
                raise ValueError("too long")
        return text

    def _repeated(self, text: str) -> str:
        found = QUANTIFIER.match(self._pattern, self._at)
        if found is None:
            return text
        self._at = found.end()
        least = int(found[1]) if found[1] else int(found[0][0] == "+")
        if least * len(text) > LONGEST:
            raise ValueError("too long")
        return text * least

    def _atom(self) -> str:
        if self._skip("("):
            self._match(GROUP)
            text = self.alternatives()
            if not self._skip(")"):
                raise ValueError("a group that does not end")
            return text
        for kind in (PROPERTY, ESCAPE, CLASS):
            if atom := self._match(kind):
                return _member(atom)
        sign = self._pattern[self._at]
        self._at += 1
        return {".": "a", "^": "", "$": ""}.get(sign, sign)

    def _skip(self, sign: str) -> bool:
        is_next = self._pattern.startswith(sign, self._at)
        self._at += len(sign) if is_next else 0
        return is_next

    def _match(self, kind: re.Pattern[str]) -> str:
        found = kind.match(self._pattern, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]


def _member(atom: str) -> str:
    """A character that an escape or a class stands for; nothing where it stands between two."""
    if atom in (r"\b", r"\B", r"\A", r"\z", r"\Z"):
        return ""
    plain = PROPERTY.sub(lambda found: PROPERTIES.get(found[1] or found[2], "a"), atom)
    if plain != atom and not atom.startswith("["):
        return plain
    codes = [int(code, 16) for code in re.findall(r"\\[xuU]\{?([0-9a-fA-F]{2,8})", plain)]
    named = [chr(code) for code in codes if code <= sys.maxunicode]
    if SET_OPERATION.search(plain, 1):
        raise ValueError("a class made of classes")
    matches = re.compile(re.sub(r"\\[xu]\{([^}]*)\}", _as_python, plain)).fullmatch
    for character in [*MEMBERS, *named, *plain]:
        if matches(character):
            return character
    raise ValueError("no member was found")


def _as_python(found: re.Match[str]) -> str:
    return f"\\U{int(found[1], 16):08x}"
