"""What clients write stays text: a special token's name in a message is no special token.

Chat templates put messages between special tokens, and a tokenizer cannot tell those of the
template from those that a message spells out. So the latter are marked before the template sees
them, with a character that occurs nowhere else, and are tokenized as the plain text that they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF8FF)]
"""Characters without a meaning of their own."""
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerFast, Literals] = WeakKeyDictionary()


class Literals:
    """The special tokens of a tokenizer and of its chat template, as texts.

    It is kept as long as the tokenizer lives, and so holds on to nothing that does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.values()
        structure = _empty_conversation(tokenizer)
        guarded = {token.content for token in added if token.special or token.content in structure}
        self._guarded = _any_of(guarded)
        self._added = _any_of(
            {token.content for token in added},
            before={token.content for token in added if token.lstrip},
            after={token.content for token in added if token.rstrip},
        )
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Literals:
        """Those of a tokenizer, found once."""
        if tokenizer not in _KNOWN:
            _KNOWN[tokenizer] = cls(tokenizer)
        return _KNOWN[tokenizer]

    def marker(self, value: Any) -> str | None:
        """A character with which `value`'s special tokens can be marked; None if it has none."""
        texts = list(_texts(value))
        if not any(self._guarded.search(text) for text in texts):
            return None
        return next(mark for mark in PRIVATE_USE if not any(mark in text for text in texts))

    def marked(self, value: Any, marker: str) -> Any:
        """`value` with `marker` inside every special token that a text of it spells out."""
        if isinstance(value, str):
            while self._guarded.search(value):  # again where two of them overlap
                value = self._guarded.sub(lambda found: found[0][0] + marker + found[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self.marked(k, marker): self.marked(v, marker) for k, v in value.items()}
        if isinstance(value, list):
            return [self.marked(each, marker) for each in value]
        return value

    def encode(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text: str,
        marker: str,
        *,
        add_special_tokens: bool,
    ) -> list[int]:
        """Tokens of a rendered text; what is marked in it is text.

        Args:
            tokenizer: the one that these special tokens are of.
        """
        ids: list[int] = []
        end = 0
        for found in self._added.finditer(text):
            ids += self._encode_plain(text[end : found.start()], marker)
            ids += tokenizer.encode(found[0], add_special_tokens=False)
            end = found.end()
        ids += self._encode_plain(text[end:], marker)
        if not add_special_tokens:
            return ids
        alone = tokenizer.encode("a", add_special_tokens=False)
        around = tokenizer.encode("a", add_special_tokens=True)
        first = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
        return around[:first] + ids + around[first + len(alone) :]

    def _encode_plain(self, text: str, marker: str) -> list[int]:
        plain = text.replace(marker, "")
        return self._plain.encode_batch_fast([plain], add_special_tokens=False)[0].ids


def _empty_conversation(tokenizer: PreTrainedTokenizerFast) -> str:
    """What the chat template writes around a message; empty when there is no template."""
    try:
        messages = [{"role": "user", "content": ""}]
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return ""


def _any_of(
    texts: Set[str], before: Set[str] = frozenset(), after: Set[str] = frozenset()
) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first, with white space around those that take it."""
    each = [
        (r"\s*" if text in before else "") + re.escape(text) + (r"\s*" if text in after else "")
        for text in sorted(texts, key=len, reverse=True)
        if text
    ]
    return re.compile("|".join(each) or r"(?!)")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return []
