"""Log probabilities on their way to clients: tokens as text, in the shapes of both endpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine import TokenLogprob
from vdiff_kserve.openai.protocol import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
)
from vdiff_kserve.openai.text import BROKEN

LEAST_LOGPROB = -9999.0
"""What JSON gets for an impossible token, as in vLLM."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class ScoredToken:
    """A token and how likely it was.

    Attributes:
        text: the token alone, as the client wants to see it.
        utf8: its bytes, also where it is only a part of a character.
        rank: among the tokens that could have been written, from 1.
        top: the likeliest tokens, likeliest first.
        is_scored: False for a token of a prompt of which nothing is known.
    """

    token_id: int
    text: str
    utf8: bytes
    logprob: float
    rank: int
    top: tuple[ScoredToken, ...] = ()
    is_scored: bool = True


class TokenTexts:
    """Single tokens as text.

    Args:
        as_ids: write `token_id:5` for the text of token 5.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def scored(self, told: TokenLogprob) -> ScoredToken:
        """A committed token and its rivals."""
        top = tuple(
            self._scored(token, logprob, rank) for rank, (token, logprob) in enumerate(told.top, 1)
        )
        return self._scored(told.token_id, told.logprob, told.rank, top)

    def text(self, token: int) -> str:
        """The token alone."""
        return f"token_id:{token}" if self._as_ids else self._decode(token)

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def unscored(self, token: int) -> ScoredToken:
        """A token of which nothing is known."""
        return replace(self._scored(token, 0.0, 0), is_scored=False)

    def _scored(
        self, token: int, logprob: float, rank: int, top: tuple[ScoredToken, ...] = ()
    ) -> ScoredToken:
        text = self._decode(token)
        utf8 = self._part_of_a_character(token) if BROKEN in text else None
        return ScoredToken(
            token,
            f"token_id:{token}" if self._as_ids else text,
            text.encode() if utf8 is None else utf8,
            max(logprob, LEAST_LOGPROB),
            rank,
            top,
        )

    def _part_of_a_character(self, token: int) -> bytes | None:
        """The bytes of a token of a byte-level vocabulary; None when they are not known."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        if all(character in _byte_alphabet() for character in piece):
            return bytes(_byte_alphabet()[character] for character in piece)
        return None


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies (GPT-2's) write printable bytes as the character with their number,
    the others as those from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def chat_logprobs(tokens: Sequence[ScoredToken]) -> ChatLogprobs:
    """In the shape of chats."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=each.text,
                logprob=each.logprob,
                bytes=list(each.utf8),
                top_logprobs=[
                    ChatTopLogprob(token=t.text, logprob=t.logprob, bytes=list(t.utf8))
                    for t in each.top
                ],
            )
            for each in tokens
        ]
    )


def completion_logprobs(tokens: Sequence[ScoredToken], offset: int = 0) -> CompletionLogprobs:
    """In the shape of completions: the chosen token is among the likeliest in any case.

    Args:
        offset: characters of the answer's earlier tokens.
    """
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.text)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[each.logprob if each.is_scored else None for each in tokens],
        tokens=[each.text for each in tokens],
        top_logprobs=[_by_text(each) if each.is_scored else None for each in tokens],
    )


def _by_text(chosen: ScoredToken) -> dict[str, float]:
    """The chosen token first; of tokens with the same text, the likelier."""
    found = {chosen.text: chosen.logprob}
    for each in chosen.top:
        found.setdefault(each.text, each.logprob)
    return found
