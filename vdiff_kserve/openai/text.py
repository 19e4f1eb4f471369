"""From tokens to text that may be sent: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

BROKEN = "\ufffd"
"""What decoders write for bytes that are not, or not yet, a character."""


def has_own_decoding(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer's class does more than to call the Rust tokenizer inside."""
    kind, usual = type(tokenizer), PreTrainedTokenizerFast
    return (kind.decode, kind._decode) != (usual.decode, usual._decode)


class Detokenizer:
    """Decodes an answer piece by piece; the pieces join to the text of all tokens.

    Bytes that do not yet make a character are kept until the tokens that complete them arrive. Each
    piece is decoded together with the one before it, since some decoders treat the first token of a
    text differently; byte-level ones do not. Spaces are never cleaned up.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, skip_special_tokens: bool = True
    ) -> None:
        options = {"skip_special_tokens": skip_special_tokens}
        backend = tokenizer.backend_tokenizer
        if has_own_decoding(tokenizer):
            self._decode = partial(tokenizer.decode, **options, clean_up_tokenization_spaces=False)
            self._needs_context = True
        else:
            self._decode = partial(backend.decode, **options)
            self._needs_context = not isinstance(backend.decoder, ByteLevel)
        self._tokens: list[int] = []
        self._context = 0
        self._whole = 0
        self._sent = 0
        self._before = (0, 0, 0)

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that became complete with these tokens."""
        self._before = (self._context, self._whole, self._sent)
        self._tokens.extend(token_ids)
        text = self._decode(self._tokens[self._context :])
        complete = text.rstrip(BROKEN)
        piece, self._sent = complete[self._sent :], max(self._sent, len(complete))
        if complete == text and self._needs_context:
            self._context, self._whole = self._whole, len(self._tokens)
            self._sent = len(self._decode(self._tokens[self._context :]))
        elif complete == text:
            self._context, self._sent = len(self._tokens), 0
        return piece

    def take_back(self, count: int) -> Detokenizer:
        """A decoder as this one was before its last `count` tokens, which were added at once."""
        earlier = copy(self)
        earlier._tokens = self._tokens[: len(self._tokens) - count]
        earlier._context, earlier._whole, earlier._sent = self._before
        return earlier

    def flush(self) -> str:
        """The rest, with `BROKEN` where the answer ended within a character."""
        text = self._decode(self._tokens[self._context :])
        piece, self._sent = text[self._sent :], len(text)
        return piece


class AnswerText:
    """The text of one answer as it grows, cut at the first stop string.

    The last character is always kept back until more follows or the answer ends, so that the piece
    which carries the finish reason also carries text.

    Args:
        include_stop: whether the stop string is the text's end, or comes after it.
        min_tokens: a stop string that is complete within so many tokens does not count.

    Attributes:
        num_tokens: tokens read; with stop strings, up to the one that completed the match.
        stop_string: the stop string that ended the answer.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = tuple(stops)
        self._longest_stop = max(map(len, stops), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._kept = ""
        self._early = 0  # characters of `_kept` in which no stop string may end
        self.num_tokens = 0
        self.stop_string: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that may be sent after these tokens; empty once a stop string was found."""
        early = min(max(0, self._min_tokens - self.num_tokens), len(token_ids))
        for piece in (token_ids[:early], token_ids[early:]):
            if piece and self.stop_string is None:
                self._read(piece)
        return "" if self.stop_string is not None else self._release()

    def finish(self) -> str:
        """The rest of the text."""
        if self.stop_string is None:
            self._kept += self._detokenizer.flush()
            self._cut_at_stop()
        text, self._kept = self._kept, ""
        return text

    def _read(self, token_ids: Sequence[int]) -> None:
        """Decode tokens at once; one by one only where one of them completes a stop string, to
        know which."""
        text = self._kept + self._detokenizer.add(token_ids)
        if len(token_ids) > 1 and self._stop_in(text) is not None:
            self._detokenizer = self._detokenizer.take_back(len(token_ids))
            for token in token_ids:
                if self.stop_string is None:
                    self._read([token])
            return
        self.num_tokens += len(token_ids)
        self._kept = text
        if self.num_tokens <= self._min_tokens:
            self._early = len(self._kept)
        self._cut_at_stop()

    def _release(self) -> str:
        end = len(self._kept) - max(1, self._possible_stop())
        text, self._kept = self._kept[: max(0, end)], self._kept[max(0, end) :]
        self._early = max(0, self._early - len(text))
        return text

    def _cut_at_stop(self) -> None:
        found = self._stop_in(self._kept)
        if found is not None:
            end, start, self.stop_string = found
            self._kept = self._kept[: end if self._include_stop else start]

    def _stop_in(self, text: str) -> tuple[int, int, str] | None:
        """End, start and text of the stop string that is complete first; of several, the one that
        starts first."""
        if not self._stops:
            return None
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, self._early - len(stop) + 1))) >= 0
        ]
        return min(found, default=None)

    def _possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for length in range(min(len(self._kept), self._longest_stop - 1), 0, -1):
            tail = self._kept[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
