"""The shortest way to end a text that a grammar governs.

A canvas has so many positions and no more, so a row must know at every moment that its text can
still be ended in those that are left. TruncProof (arXiv 2605.13076) computes that number for LL(1)
grammars; here the grammar is a black box that tells which tokens may come next, so an ending is
searched for. Whatever is found is a proof: an ending that the grammar accepts, token by token. What
is missed only costs freedom, never correctness.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

MAX_TRIES = 8000
"""Tokens that a thorough search tries, at most; a count, so that it ends alike on every machine."""
FEW = 24
"""So many allowed tokens are all tried."""
LETTERS = b"qxzQ "
"""Where all of these may come next, the text is inside a free string."""


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

    def find(self, matcher: LLMatcher, limit: int, *, thorough: bool) -> list[int] | None:
        """An ending of at most `limit` tokens; None when none was found.

        Args:
            thorough: search on when closing what is open, one thing after the other, is too long.
        """
        found = self._greedy(matcher.deep_copy(), limit)
        if found is None and thorough:
            found = self._best_first(matcher, limit)
        return found if found is not None and self.is_ending(matcher, found) else None

    def _greedy(self, state: LLMatcher, limit: int) -> list[int] | None:
        path: list[int] = []
        while not state.is_accepting():
            tokens = state.compute_ff_tokens() or [self._closer(self._allowed(state))]
            path += tokens
            if len(path) > limit or state.try_consume_tokens(tokens) < len(tokens):
                return None
        return path

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
            for token in self._candidates(state):
                tries += 1
                child = state.deep_copy()
                if len(path) >= limit or not child.try_consume_tokens([token]):
                    continue
                signature = b"" if child.is_accepting() else child.compute_bitmask()
                key = (len(path), signature + child.compute_ff_bytes())
                if key not in seen:
                    seen.add(key)
                    heapq.heappush(heap, (len(path) + 1, -next(order), [*path, token], child))
        return None

    def _allowed(self, state: LLMatcher) -> NDArray[np.int64]:
        mask = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(mask, bitorder="little").nonzero()[0]

    def _closer(self, allowed: NDArray[np.int64]) -> int:
        """The token that most likely brings the end nearer, in JSON and what looks like it."""
        texts = self._texts
        within = {int(token) for token in allowed if int(token) not in self._end_tokens}
        in_string = all(self._single.get(byte) in within for byte in LETTERS)
        closing = [t for t in self._closers if t in within]
        if in_string:
            fitting = [t for t in closing if texts[t].startswith(b'"')]
        else:
            fitting = [t for t in closing if b'"' not in texts[t]]
            fitting = fitting or [t for t in closing if not texts[t].strip(b'"')]
        if fitting:
            return max(fitting, key=lambda t: len(texts[t]))
        digit = self._single.get(ord("0"))
        if digit in within and not in_string:
            return int(digit)
        plain = [t for t in within if texts[t].strip().isalnum()]
        if plain:
            return max(plain, key=lambda t: (len(texts[t]), -t))
        return min(within or self._end_tokens, key=lambda t: (len(texts[t]), t))

    def _candidates(self, state: LLMatcher) -> Iterator[int]:
        allowed = [int(t) for t in self._allowed(state) if int(t) not in self._end_tokens]
        if len(allowed) <= FEW:
            yield from allowed
            return
        within = set(allowed)
        yield from (t for t in self._closers if t in within)
        by_first: dict[bytes, int] = {}
        for token in allowed:
            first = self._texts[token][:1]
            if len(self._texts[token]) < len(self._texts[by_first.setdefault(first, token)]):
                by_first[first] = token
        yield from by_first.values()
        plain = [t for t in allowed if self._texts[t].isalnum()]
        yield from sorted(plain, key=lambda t: -len(self._texts[t]))[:2]

    @cached_property
    def _texts(self) -> list[bytes]:
        """Every token's bytes."""
        decode = self._tokenizer.decode_bytes
        return [decode([token]) for token in range(self._tokenizer.vocab_size)]

    @cached_property
    def _closers(self) -> list[int]:
        """Tokens of quotes and brackets only, that close more than they open."""
        return [t for t, text in enumerate(self._texts) if text and not text.strip(b'"}]')]

    @cached_property
    def _single(self) -> dict[int, int]:
        """Byte -> the token that is this byte alone."""
        return {text[0]: t for t, text in enumerate(self._texts) if len(text) == 1}
