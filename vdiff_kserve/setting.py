"""One setting of the server: how it is read from text, checked and described."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Kind = type[int] | type[float] | type[str] | type[bool]
SIZE = (r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", "a size such as 512MiB or 4GiB")
"""What a size looks like: a regular expression, and words."""
TRUE_WORDS = ("1", "true", "yes", "on", "y", "t")
FALSE_WORDS = ("0", "false", "no", "off", "n", "f")

SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""What other programs call an allowed value."""


class ConfigError(ValueError):
    """A setting that cannot be; the message names the flag and what is allowed."""


@dataclass(frozen=True)
class Setting:
    """How one setting is read from text and checked.

    Attributes:
        kind: int, float, str or bool; `many` settings hold a tuple of them.
        default: value when neither the command line nor the environment names one.
        help: one sentence or two for the help page and the docs.
        group: heading on the help page.
        metavar: stands for the value on the help page.
        choices: the only allowed values, when there are few.
        pattern: what a string must look like, as (regular expression, words).
        low, high: bounds of a number, both included unless `low_open`.
        default_text: says what a default of None means.
        aliases: further names of the same setting.
        many: whether it takes several values.
        negation: for a bool, the flag that turns it off.
        secret: the value is never shown.
        is_path: whether `~` at its beginning is the user's home.
    """

    kind: Kind
    default: Any
    help: str
    group: str
    metavar: str
    choices: tuple[str, ...] = ()
    pattern: tuple[str, str] | None = None
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    default_text: str = ""
    aliases: tuple[str, ...] = ()
    many: bool = False
    negation: str = ""
    secret: bool = False
    is_path: bool = False

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty when any text will do."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.pattern:
            return self.pattern[1]
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return ""
        noun = "an integer" if self.kind is int else "a number"
        if self.low is None:
            return noun
        if self.high is None:
            return f"{noun} of at least {self.low:g}"
        if self.low_open:
            return f"{noun} above {self.low:g} and at most {self.high:g}"
        return f"{noun} from {self.low:g} to {self.high:g}"

    @property
    def default_words(self) -> str:
        """The default, or what it means."""
        return self.default_text or str(self.default)

    def parse(self, text: str) -> bool | int | float | str:
        """The value that a text stands for.

        Raises:
            argparse.ArgumentTypeError: the text is not an allowed value.
        """
        if self.kind is bool:
            return parse_bool(text)
        if self.is_path:
            text = os.path.expanduser(text)  # noqa: PTH111  a hub id is no path and stays as it is
        value: int | float | str = text.lower() if self.choices else text
        with contextlib.suppress(ValueError):
            value = self.kind(value)
        if problem := self.problem(value):
            meant = SHORT_NAMES.get(str(value))
            if meant in self.choices:
                problem += f"; did you mean {meant}?"
            raise argparse.ArgumentTypeError(problem)
        return value

    def problem(self, value: object) -> str:
        """Why a value is not allowed; empty when it is."""
        if self.kind is bool:
            fits = isinstance(value, bool)
        else:
            fits = self._text_fits(value) if self.kind is str else self._number_fits(value)
        if fits:
            return ""
        given = "" if self.secret else f", got {value!r}"
        return f"must be {self.allowed or 'a non-empty text'}{given}"

    def _text_fits(self, value: object) -> bool:
        if not isinstance(value, str) or not value.strip():
            return False
        if self.choices:
            return value in self.choices
        return self.pattern is None or re.fullmatch(self.pattern[0], value) is not None

    def _number_fits(self, value: object) -> bool:
        numbers = (int,) if self.kind is int else (int, float)
        if not isinstance(value, numbers) or isinstance(value, bool):
            return False
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return low < value <= high if self.low_open else low <= value <= high


def with_underscores(argv: Sequence[str] | None) -> list[str]:
    """A command line, or the process's own, whose options may be written with dashes: the server's
    may, so that people write those of its tools so too."""
    given = sys.argv[1:] if argv is None else argv
    return [
        re.sub(r"^--\w[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), each)
        for each in given
    ]


def parse_size(text: str) -> int:
    """Bytes that a size such as "512MiB", "4GiB" or "4GB" stands for.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(SIZE[0], text)
    if match is None:
        raise ValueError(f"must be {SIZE[1]}, got {text!r}")
    number, unit = match.groups()
    base = 1024 if unit.endswith("iB") else 1000
    return int(float(number) * base ** " KMGT".index(unit[0] if len(unit) > 1 else " "))


def parse_bool(text: str) -> bool:
    """The truth value that a text stands for.

    Raises:
        argparse.ArgumentTypeError: it stands for none.
    """
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in TRUE_WORDS
