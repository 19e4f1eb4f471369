"""Answers that must match a grammar: compiled once, and followed left to right by every row.

A grammar is text that llguidance reads (`LLMatcher.grammar_from_json_schema` and its like), so a
request that carries one can be pickled. Three things make a row's answer match without slowing it
to a token per pass:

- what the grammar leaves no choice about is written without asking the model;
- at the frontier the model chooses among the tokens that may come next; right of it, it writes what
  it likes, as long as the text that this completes can be continued (look-ahead, as in LAVE,
  arXiv 2602.00612), and what turns out wrong when the frontier arrives is masked again;
- a token is final only when an ending that fits the rest of the canvas is known (see `closing`).

An engine without grammars runs where llguidance is not installed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine.closing import ClosingSearch, Hint
from vdiff_kserve.engine.examples import examples
from vdiff_kserve.engine.request import EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_GRAMMARS = 64
"""Compiled grammars that are kept, those used last. Most take a tenth of a megabyte; those whose
long repetitions make many states take up to twenty, for they grow while they are used."""


class GrammarError(EngineError):
    """A grammar that cannot be used: malformed, impossible or too large."""


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar, ready for rows.

    Attributes:
        matcher: at the beginning of a text; it is copied, never moved.
        shortest: a text that matches, the shortest one that was found.
        hints: texts that its regular expressions match, as tokens.
        search: finds endings.
    """

    matcher: LLMatcher
    shortest: tuple[int, ...]
    hints: tuple[Hint, ...]
    search: ClosingSearch

    def ending(self, matcher: LLMatcher, limit: int, *, thorough: bool) -> list[int] | None:
        """An ending of a text of this grammar; see `ClosingSearch.find`."""
        return self.search.find(matcher, limit, thorough=thorough, hints=self.hints)


class Grammars:
    """Compiles grammars for one tokenizer. May be used from any thread.

    Args:
        vocab_size: of the model; tokens beyond it cannot be written.
        end_token_ids: tokens that end a text, at least one.
        longest: tokens that any answer has at most.

    Raises:
        GrammarError: llguidance cannot read the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        end_token_ids: Sequence[int],
        longest: int,
    ) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self._tokenizer: LLTokenizer = from_tokenizer(
                tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=list(end_token_ids)
            )
        except ValueError as error:
            raise GrammarError(f"llguidance cannot read the tokenizer: {error}") from error
        self._search = ClosingSearch(self._tokenizer, end_token_ids)
        self._longest = longest
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str, room: int | None = None) -> CompiledGrammar:
        """The compiled grammar; from memory when it was used before.

        Args:
            room: tokens that the shortest text should fit in; more effort is made to find one.

        Raises:
            GrammarError: it cannot be used.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
        if room is not None and len(compiled.shortest) > room:
            own = compiled.matcher.deep_copy()  # requests begin from the other one meanwhile
            shorter = compiled.ending(own, room, thorough=True)
            compiled = replace(compiled, shortest=tuple(shorter or compiled.shortest))
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled

    def has(self, grammar: str, room: int) -> bool:
        """Whether `compile` has nothing to do but remember."""
        with self._lock:
            compiled = self._compiled.get(grammar)
        return compiled is not None and len(compiled.shortest) <= room

    def start(self, grammar: str, room: int) -> GrammarCursor:
        """The beginning of a text of at most `room` tokens.

        Raises:
            GrammarError: the grammar cannot be used, or not in so few tokens.
        """
        compiled = self.compile(grammar, room)
        if len(compiled.shortest) > room:
            raise GrammarError(
                f"the shortest text that matches has {len(compiled.shortest)} tokens, and the "
                f"answer may have {room}"
            )
        return GrammarCursor(compiled, room)

    def _compile(self, grammar: str) -> CompiledGrammar:
        from llguidance import LLMatcher, LLParserLimits

        # Its own bounds on sizes and effort, without grammars in error messages.
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        hints = tuple(self._search.hint(text) for text in examples(grammar))
        compiled = CompiledGrammar(matcher, (), hints, self._search)
        shortest = compiled.ending(matcher, self._longest, thorough=True)
        if shortest is None:
            raise GrammarError(
                f"no text of at most {self._longest} tokens, the model's context, was found that "
                "matches"
            )
        return replace(compiled, shortest=tuple(shortest))


def _reason(message: str) -> str:
    """What llguidance says without the excerpts that it draws and options that requests have not:
    its first line, and the one that says what is wrong with a regular expression."""
    if "coerce_one_of" in message:
        return "oneOf is supported only where no JSON can match two of its schemas; write anyOf"
    first, *others = message.strip().splitlines()
    named = [line for line in others if line.startswith("error: ")]
    return " ".join([first, *named[:1]])


class GrammarCursor:
    """Where one answer is in its grammar. One thread at a time moves it on, while others may read
    its attributes: llguidance refuses even to look at a matcher that another thread works with.

    Args:
        room: tokens that the answer may have, at least as many as the shortest text.

    Attributes:
        room: tokens that are left of it.
        complete: whether nothing may follow, or nothing fits any more. The text matches then.
    """

    def __init__(self, grammar: CompiledGrammar, room: int) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._ending = list(grammar.shortest)
        self.room = room
        self.complete = self._matcher.is_stopped() or room == 0

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: bool [vocab]."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = torch.from_numpy(np.unpackbits(mask, bitorder="little")[:vocab_size])
        return bits.bool()

    def extends(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(list(tokens))

    def take(self, tokens: Sequence[int]) -> int:
        """Go on by as many of the tokens as may come next and leave room to end the text.

        Returns:
            How many these are.
        """
        length = self.extends(tokens[: self.room])
        while length > 0:
            ending = self._ending_after(tokens[:length])
            if ending is not None:
                return self._advance(tokens[:length], ending)
            length -= 1
        return 0

    def take_forced(self) -> list[int]:
        """Go on by the tokens to which there is no alternative."""
        forced: list[int] = []
        while not self.complete:
            tokens = self._matcher.compute_ff_tokens()
            if tokens and self.take(tokens) == len(tokens):
                forced += tokens
            elif tokens or len(self._ending) == self.room:
                forced += self.take_ending(len(self._ending) if not tokens else 1)
            else:
                break
        return forced

    def take_ending(self, length: int = 1) -> list[int]:
        """Go on by the first tokens of the known ending, whatever else may come next; without any,
        the text ends."""
        if not self._ending:
            self.room = 0
        tokens, ending = self._ending[:length], self._ending[length:]
        self._advance(tokens, ending)
        return tokens

    def _advance(self, tokens: Sequence[int], ending: Sequence[int]) -> int:
        """Take tokens that are known to be allowed; an end token where nothing else may follow is
        left, since the text has ended before it."""
        taken = self._matcher.try_consume_tokens(list(tokens))
        if taken < len(tokens) and not self._matcher.is_stopped():
            raise GrammarError(f"the matcher refuses what it allowed: {self._matcher.get_error()}")
        self.room -= taken
        self._ending = list(ending)
        self.complete = self._matcher.is_stopped() or self.room == 0
        return taken

    def _ending_after(self, tokens: Sequence[int]) -> list[int] | None:
        """A way to end the text after these tokens in the room they leave; None if none is known.

        What would have ended it before, or a part of that, mostly still does.
        """
        room = self.room - len(tokens)
        after = self._matcher.deep_copy()
        after.try_consume_tokens(list(tokens))
        if after.is_stopped():
            return []
        for start in range(len(self._ending), max(-1, len(self._ending) - room - 1), -1):
            if self._grammar.search.is_ending(after, self._ending[start:]):
                return self._ending[start:]
        return self._grammar.ending(after, room, thorough=False)
