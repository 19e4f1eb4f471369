"""Names that are no field, but were meant to be one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile

LONGEST = 64
"""Characters of a name that is compared; no field has as many."""
SHORT, LONG = 5, 9
"""Letters from which a name may differ in one letter, and in two; a shorter one is only recognized
with a letter too many, or with two that changed places."""

CLIENTS_OWN = frozenset(("mode", "models", "return_tokens", "speed"))
"""Fields of other servers that look like misspelled ones, and that clients send to every server."""


class Names:
    """Names of fields, found by what was nearly one of them.

    Case, hyphens and underscores do not count: `maxTokens` and `top-k` are meant to be `max_tokens`
    and `top_k`. Of the rest, few letters may be wrong.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [(name, _plain(name), frozenset(_plain(name))) for name in sorted(names)]

    def meant_by(self, unknown: str) -> str | None:
        """The name that an unknown one must stand for; None where it is another."""
        if len(unknown) > LONGEST or unknown in CLIENTS_OWN:
            return None
        word = _plain(unknown)
        letters = frozenset(word)
        near = []
        for name, plain, own in self._names:
            allowed = 2 if len(plain) >= LONG else 1
            # A wrong letter adds one to the letters that only one of them has, and takes another.
            if abs(len(word) - len(plain)) > allowed or len(letters ^ own) > 2 * allowed:
                continue
            errors = edits(word, plain)
            if errors <= allowed and (len(plain) >= SHORT or _is_longer_or_turned(word, plain)):
                near.append((errors, -_begins_alike(word, plain), name))
        return min(near)[2] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name).lower()


def _begins_alike(one: str, other: str) -> int:
    """Letters from the left that both share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _is_longer_or_turned(word: str, name: str) -> bool:
    if len(word) == len(name):
        return sorted(word) == sorted(name)
    return len(word) > len(name) >= 4


def edits(one: str, other: str) -> int:
    """Letters to insert, drop, replace or swap with their neighbours to turn one into the other:
    the optimal string alignment distance."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        further = [i + 1]
        for j, wanted in enumerate(other):
            cost = min(row[j] + (letter != wanted), row[j + 1] + 1, further[j] + 1)
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                cost = min(cost, before[j - 1] + 1)
            further.append(cost)
        before, row = row, further
    return row[-1]
