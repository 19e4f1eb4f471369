"""Finding the calls in an answer's text, while it grows.

Two ways of writing a call, by the names that vLLM's parsers have: `hermes`, JSON between tags in a
text, as Qwen's and many other models are trained, and `json`, an answer that is a call or a list of
calls and nothing else, as Llama's. A model that knows neither writes the arguments alone where only
one function can be meant.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

ParserName = Literal["hermes", "json"]
OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
"""How a call begins when its arguments can be told while they are written."""
JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*(?P<closed>")?|[{}\[\],]|[^\s"{}\[\],]+', re.DOTALL)
"""A string, a sign, or a run of anything else."""
SIGNS = "{}[],"
HEAD_LENGTH = 512
"""A call that has not begun within so many characters is text."""
BLANK = " \t\r\n"


@dataclass(frozen=True)
class Found:
    """What became certain of an answer: text, the beginning of a call, or more of its arguments.

    Attributes:
        call: the number of the call; None for text.
        call_id, name: of a call that begins.
    """

    text: str = ""
    call: int | None = None
    call_id: str | None = None
    name: str | None = None


class ToolParser(Protocol):
    """Takes an answer's text piece by piece."""

    def add(self, text: str) -> list[Found]:
        """What the new text makes certain."""
        ...

    def finish(self) -> list[Found]:
        """The rest, when the answer is over."""
        ...


def make_parser(
    name: ParserName, functions: Collection[str], *, only_arguments: bool = False
) -> ToolParser:
    """A parser for one answer.

    Args:
        functions: names of those that may be called; other calls stay text.
        only_arguments: the answer is the arguments of the one function.
    """
    if only_arguments:
        (function,) = functions
        return ArgumentsParser(function)
    return HermesParser(functions) if name == "hermes" else JsonParser(functions)


class ValueScanner:
    """Finds where the JSON value that begins at `start` ends, in a text that grows."""

    def __init__(self, start: int) -> None:
        self._next = start  # the first part that was not read yet
        self._depth = 0
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """Where the value ends; None while it goes on."""
        if self._end is None:
            for part in JSON_PART.finditer(text, self._next):
                self._next = part.start()
                if self._is_unfinished(part) or self._ends_before(part):
                    break
                self._next = part.end()
                if self._depth == 0:
                    self._end = part.end()
                    break
        return self._end

    def _is_unfinished(self, part: re.Match[str]) -> bool:
        """Whether more text may belong to a string or a word."""
        first = part[0][0]
        if first == '"':
            return part["closed"] is None
        return first not in SIGNS and self._depth == 0 and part.end() == len(part.string)

    def _ends_before(self, part: re.Match[str]) -> bool:
        """Take note of a sign; says whether it belongs to what is around the value."""
        first = part[0][0]
        if first in "}]," and self._depth == 0:
            self._end = part.start()
            return True
        self._depth += (first in "{[") - (first in "}]")
        return False


class CallReader:
    """Reads one call, `{"name": ..., "arguments": ...}`, from a text that grows.

    Attributes:
        seen: the call's text.
        rest: text behind the call, once it is whole.
        begun: whether its beginning was told.
        failed: the text is no call; `seen` has all of it.
    """

    def __init__(self, number: int, functions: Collection[str]) -> None:
        self.seen = ""
        self.rest: str | None = None
        self.begun = False
        self.failed = False
        self._number = number
        self._functions = functions
        self._whole = ValueScanner(0)
        self._arguments: ValueScanner | None = None
        self._told = 0

    def is_open(self) -> bool:
        """Whether more text is wanted."""
        return self.rest is None and not self.failed

    def add(self, text: str) -> list[Found]:
        """What the new text makes certain of the call."""
        self.seen += text
        found = [] if self.begun else self._begin()
        end = self._whole.end(self.seen)
        if end is not None and not self.failed:
            self.seen, self.rest = self.seen[:end], self.seen[end:]
        if self._arguments is not None:
            found += self._more_arguments(self._arguments)
        elif self.rest is not None:
            found += self._in_other_order()
        return found

    def _begin(self) -> list[Found]:
        head = HEAD.match(self.seen)
        if head is not None and head.end() < len(self.seen):
            name = _text_of(head[1])
            self.failed = name not in self._functions
            if self.failed:
                return []
            self.begun, self._told = True, head.end()
            self._arguments = ValueScanner(head.end())
            return [Found("", self._number, new_call_id(), name)]
        start = self.seen.lstrip()
        self.failed = bool(start) and (start[0] != "{" or len(start) > HEAD_LENGTH)
        return []

    def _more_arguments(self, arguments: ValueScanner) -> list[Found]:
        end = arguments.end(self.seen)
        fresh = self.seen[self._told : end]
        self._told = max(self._told, len(self.seen) if end is None else end)
        return [Found(fresh, self._number)] if fresh else []

    def _in_other_order(self) -> list[Found]:
        """A whole call that is not written with its name first."""
        try:
            call = json.loads(self.seen)
        except (ValueError, RecursionError):
            call = None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._functions:
            self.failed = True
            return []
        self.begun = True
        arguments = call.get("arguments", call.get("parameters", {}))
        return [
            Found("", self._number, new_call_id(), name),
            Found(json.dumps(arguments, ensure_ascii=False), self._number),
        ]


def new_call_id() -> str:
    """An id for a call, in vLLM's form."""
    return f"chatcmpl-tool-{secrets.token_hex(8)}"


def _text_of(quoted: str) -> str | None:
    try:
        text = json.loads(quoted)
    except ValueError:
        return None
    return text if isinstance(text, str) else None


class HermesParser:
    """Calls between `<tool_call>` and `</tool_call>`; what stands outside is text."""

    def __init__(self, functions: Collection[str]) -> None:
        self._functions = functions
        self._kept = ""
        self._call: CallReader | None = None
        self._calls = 0

    def add(self, text: str) -> list[Found]:
        """What the new text makes certain. Blanks around calls are not text."""
        self._kept += text
        found: list[Found] = []
        while self._kept:
            before = len(self._kept)
            found += self._in_call() if self._call is not None else self._in_text()
            if len(self._kept) == before:
                break
        return found

    def finish(self) -> list[Found]:
        """Text that was held back; a call that was never whole stays as it was told."""
        kept, self._kept = self._kept, ""
        if self._call is not None and not self._call.begun:
            kept, self._call = OPEN_TAG + self._call.seen + kept, None
        return [Found(kept)] if kept.strip() and self._call is None else []

    def _in_text(self) -> list[Found]:
        at = self._kept.find(OPEN_TAG)
        if at >= 0:
            text, self._kept = self._kept[:at].rstrip(), self._kept[at + len(OPEN_TAG) :]
            self._call = CallReader(self._calls, self._functions)
            return [Found(text)] if text else []
        end = len(self._kept) - _beginning_of(OPEN_TAG, self._kept)
        end = len(self._kept[:end].rstrip())
        text, self._kept = self._kept[:end], self._kept[end:]
        return [Found(text)] if text else []

    def _in_call(self) -> list[Found]:
        call = self._call
        assert call is not None
        if call.is_open():
            text, self._kept = self._kept, ""
            found = call.add(text)
            if call.rest is not None:
                self._kept = call.rest
            if call.failed:
                self._call = None
                return [*found, *self._as_text(call)]
            return found
        inside = self._kept.lstrip()
        if inside.startswith(CLOSE_TAG):
            self._kept, self._call = inside[len(CLOSE_TAG) :], None
            self._calls += 1
        elif inside and not CLOSE_TAG.startswith(inside):
            self._call = None  # the tag is missing, but the call is whole
            self._calls += 1
        return []

    def _as_text(self, call: CallReader) -> list[Found]:
        rest, self._kept = self._kept, ""
        return [Found(OPEN_TAG + call.seen + rest)]


class JsonParser:
    """An answer that is one call or a list of calls; any other answer is text."""

    def __init__(self, functions: Collection[str]) -> None:
        self._functions = functions
        self._kept = ""
        self._calls = 0
        self._call: CallReader | None = None
        self._is_text = False
        self._is_over = False

    def add(self, text: str) -> list[Found]:
        """What the new text makes certain."""
        if self._is_text:
            return [Found(text)] if text else []
        self._kept += text
        found: list[Found] = []
        while self._kept and not self._is_over:
            if self._call is None and not self._open():
                break
            found += self._in_call()
            if self._call is not None:
                break
        return found

    def finish(self) -> list[Found]:
        """Text that was held back."""
        call = self._call
        kept = (call.seen if call is not None and not call.begun else "") + self._kept
        return [Found(kept)] if kept.strip() and self._calls == 0 and not self._begun else []

    @property
    def _begun(self) -> bool:
        return self._call is not None and self._call.begun

    def _open(self) -> bool:
        """Go on to the next call, if the text has got there."""
        start = self._kept.lstrip(BLANK + ("[" if self._calls == 0 else ",;"))
        if start.startswith("]"):
            self._is_over = True
        if not start or self._is_over:
            return False
        self._prefix, self._kept = self._kept[: len(self._kept) - len(start)], start
        self._call = CallReader(self._calls, self._functions)
        return True

    def _in_call(self) -> list[Found]:
        call = self._call
        assert call is not None
        text, self._kept = self._kept, ""
        found = call.add(text)
        if call.rest is not None:
            self._kept = call.rest
        if call.failed:
            self._call = None
            if self._calls:
                self._is_over = True  # behind the calls there is nothing to tell
                return []
            self._is_text = True
            rest, self._kept = self._kept, ""
            return [Found(self._prefix + call.seen + rest)]
        if call.rest is not None:
            self._call, self._calls = None, self._calls + 1
        return found


class ArgumentsParser:
    """An answer that is nothing but the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def add(self, text: str) -> list[Found]:
        """The call begins with the first text."""
        if not text:
            return []
        found = [] if self._begun else [Found("", 0, new_call_id(), self._name)]
        self._begun = True
        return [*found, Found(text, 0)]

    def finish(self) -> list[Found]:
        """Nothing is held back."""
        return []


def _beginning_of(tag: str, text: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0


def parse_whole(parser: ToolParser, text: str) -> Sequence[Found]:
    """Everything in an answer that is over."""
    return [*parser.add(text), *parser.finish()]
