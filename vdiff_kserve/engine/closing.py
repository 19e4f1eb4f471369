"""The shortest way to end a text that a grammar governs.

A canvas has so many positions and no more, so a row must know at every moment that its text can
still be ended in those that are left. TruncProof (arXiv 2605.13076) computes that number for LL(1)
grammars; here the grammar is a black box that tells which tokens may come next, so an ending is
searched for. Whatever is found is a proof: an ending that the grammar accepts, token by token. What
is missed only costs freedom, never correctness.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_TRIES = 8000
"""Tokens that a thorough search tries, at most; a count, so that it ends alike on every machine."""
FEW = 24
"""So many allowed tokens are all tried."""
Mask = NDArray[np.bool_]
Hint = tuple[int, ...]


class ClosingSearch:
    """Finds short endings for the grammars of one tokenizer.

    Args:
        end_tokens: tokens that end a text.
    """

    def __init__(self, tokenizer: LLTokenizer, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self.end_token = end_tokens[0]

    def is_ending(self, matcher: LLMatcher, tokens: Sequence[int]) -> bool:
        """Whether the text may end after these tokens."""
        return matcher.validate_tokens([*tokens, self.end_token]) == len(tokens) + 1

    def find(
        self, matcher: LLMatcher, limit: int, *, thorough: bool, hints: Sequence[Hint] = ()
    ) -> list[int] | None:
        """An ending of at most `limit` tokens; None when none was found.

        Args:
            thorough: search on when closing what is open, one thing after the other, is too long.
            hints: texts that bring the end nearer, as tokens.
        """
        found = self._greedy(matcher.deep_copy(), limit)
        if found is None and hints:
            found = self._greedy(matcher.deep_copy(), limit, hints)
        if found is None and thorough:
            found = self._best_first(matcher, limit)
        return found if found is not None and self.is_ending(matcher, found) else None

    def hint(self, text: str) -> Hint:
        """A text as tokens."""
        return tuple(self._tokenizer.tokenize_str(text))

    def _greedy(self, state: LLMatcher, limit: int, hints: Sequence[Hint] = ()) -> list[int] | None:
        path: list[int] = []
        seen: set[bytes] = set()
        was_hint = False
        while not state.is_accepting():
            tokens = state.compute_ff_tokens()
            if tokens:
                seen.clear()
            hint = None if tokens or was_hint else _fitting(state, hints)
            was_hint = hint is not None
            tokens = tokens or list(hint or ()) or [self._step(state, seen)]
            path += tokens
            if len(path) > limit or state.try_consume_tokens(tokens) < len(tokens):
                return None
        return path

    def _step(self, state: LLMatcher, seen: set[bytes]) -> int:
        """The token that most likely brings the end nearer, in JSON and what looks like it; else,
        or where a zero did not, one that leads to where the text has not been since tokens were
        last forced."""
        allowed = _allowed(state)
        closer = self._closer(allowed)
        if closer is not None and closer != self._words.zero:
            return closer
        here = _signature(state)
        is_new = here not in seen
        seen.add(here)
        if closer is not None and is_new:
            return closer
        if closer is not None or is_new:
            for token in self._candidates(allowed):
                child = state.deep_copy()
                if child.try_consume_tokens([token]) and _signature(child) not in seen:
                    return token
        return self._longest(allowed)

    def _best_first(self, matcher: LLMatcher, limit: int) -> list[int] | None:
        """The shortest path first; of states that allow the same tokens after as many tokens, one
        is enough."""
        order = count()
        heap = [(0, -next(order), list[int](), matcher.deep_copy())]
        seen: set[tuple[int, bytes]] = set()
        tries = 0
        while heap and tries < MAX_TRIES:
            _, _, path, state = heapq.heappop(heap)
            forced = state.compute_ff_tokens()
            state.try_consume_tokens(forced)
            path = path + forced
            if state.is_accepting():
                return path if len(path) <= limit else None
            for token in self._candidates(_allowed(state)):
                tries += 1
                child = state.deep_copy()
                if len(path) >= limit or not child.try_consume_tokens([token]):
                    continue
                key = (len(path), _signature(child))
                if key not in seen:
                    seen.add(key)
                    heapq.heappush(heap, (len(path) + 1, -next(order), [*path, token], child))
        return None

    def _closer(self, allowed: Mask) -> int | None:
        """What ends a string, an object or a list, or goes on to the next part; None where nothing
        of it may come next."""
        words = self._words
        closing = [t for t in words.closers if allowed[t]]
        if allowed[words.letters].all():  # inside a string
            fitting = [t for t in closing if words.texts[t].startswith(b'"')]
            if not fitting and allowed[words.blanks].all():
                return self._longest(allowed)
        else:
            fitting = [t for t in closing if b'"' not in words.texts[t]]
            fitting = fitting or [t for t in words.commas if allowed[t]]
            fitting = fitting or [t for t in closing if not words.texts[t].strip(b'"')]
            if not fitting and words.zero is not None and allowed[words.zero]:
                return words.zero
        return max(fitting, key=lambda t: len(words.texts[t]), default=None)

    def _longest(self, allowed: Mask) -> int:
        """The longest word, or else the shortest token of any kind."""
        for order in (self._words.plain, self._words.by_length):
            ordered = order[allowed[order]]
            if len(ordered):
                return int(ordered[0])
        return self.end_token

    def _candidates(self, allowed: Mask) -> Iterator[int]:
        """What is worth a try: all tokens where they are few, else some of every kind."""
        words = self._words
        ordered = words.by_length[allowed[words.by_length]]
        if len(ordered) <= FEW:
            yield from map(int, ordered)
            return
        yield from (t for t in words.closers if allowed[t])
        _, shortest = np.unique(words.first_bytes[ordered], return_index=True)
        yield from map(int, ordered[np.sort(shortest)])
        yield from map(int, words.plain[allowed[words.plain]][:2])

    @cached_property
    def _words(self) -> Words:
        return Words.of(self._tokenizer, self._end_tokens)


@dataclass(frozen=True)
class Words:
    """The tokens of a tokenizer as texts; those that end a text are none.

    Attributes:
        texts: every token's bytes.
        first_bytes: int64 [vocab], of each token; -1 where it has none.
        by_length: int64 [n], tokens with a text, the shortest first.
        plain: int64 [n], tokens of letters and digits, the longest first.
        closers: tokens of quotes and closing brackets only.
        commas: tokens of a comma, and what may be written behind it.
        letters: int64 [n], single letters that may come next only inside a string.
        blanks: int64 [n], single characters that may come next only inside a free one.
        zero: the token `0`.
    """

    texts: list[bytes]
    first_bytes: NDArray[np.int64]
    by_length: NDArray[np.int64]
    plain: NDArray[np.int64]
    closers: list[int]
    commas: list[int]
    letters: NDArray[np.int64]
    blanks: NDArray[np.int64]
    zero: int | None

    @classmethod
    def of(cls, tokenizer: LLTokenizer, end_tokens: Set[int]) -> Words:
        """Read all tokens."""
        texts = [
            b"" if token in end_tokens else tokenizer.decode_bytes([token])
            for token in range(tokenizer.vocab_size)
        ]
        written = [t for t, text in enumerate(texts) if text]
        single = {texts[t]: t for t in written if len(texts[t]) == 1}
        plain = [t for t in written if texts[t].strip().isalnum()]
        return cls(
            texts=texts,
            first_bytes=np.array([text[0] if text else -1 for text in texts]),
            by_length=np.array(sorted(written, key=lambda t: len(texts[t])), dtype=np.int64),
            plain=np.array(sorted(plain, key=lambda t: -len(texts[t])), dtype=np.int64),
            closers=[t for t in written if not texts[t].strip(b'"}]')],
            commas=[t for t in written if texts[t].rstrip(b' "').lstrip() == b","],
            letters=_those(single, (b"q", b"x", b"z")),
            blanks=_those(single, (b" ", b"(", b"Q")),
            zero=single.get(b"0"),
        )


def _fitting(state: LLMatcher, hints: Sequence[Hint]) -> Hint | None:
    """The first of the texts that may come next as a whole."""
    return next((h for h in hints if state.validate_tokens(list(h)) == len(h)), None)


def _allowed(state: LLMatcher) -> Mask:
    mask = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(mask, bitorder="little").view(np.bool_)


def _signature(state: LLMatcher) -> bytes:
    """Alike for states that go on alike, as far as the next token tells."""
    mask = b"" if state.is_accepting() else state.compute_bitmask()
    return mask + state.compute_ff_bytes()


def _those(single: Mapping[bytes, int], texts: Sequence[bytes]) -> NDArray[np.int64]:
    return np.array([single[each] for each in texts if each in single], dtype=np.int64)
