"""From a request's fields to what its tokens must obey; the ranges are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import RequestError, out_of_range
from vdiff_kserve.openai.protocol import GenerationFields
from vdiff_kserve.sampler import Constraints

MAX_BIAS = 100.0
"""Biases beyond it are cut, as OpenAI and vLLM do."""
MAX_BAD_WORDS = 128
"""Most runs of tokens that a request's bad words may come to."""
MAX_BAD_WORD_LENGTH = 1024
"""Most characters of a bad word."""


def constraints_of(
    request: GenerationFields,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab_size: int,
    never_written: frozenset[int],
    end_token_ids: tuple[int, ...],
    max_tokens: int,
) -> Constraints | None:
    """What the request asks of its tokens; None when it asks for nothing.

    Args:
        never_written: the mask token, and others that this request cannot get.
        end_token_ids: what ends its answers.
        max_tokens: masked positions of the shortest one.

    Raises:
        RequestError: a value out of range, or so much is forbidden that some position might have no
            token left.
    """
    asked = Constraints(
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        allowed_token_ids=_allowed(request.allowed_token_ids, vocab_size),
        bad_words=_bad_words(request.bad_words or (), tokenizer),
        min_tokens=_min_tokens(request.min_tokens or 0, max_tokens),
        presence_penalty=_penalty("presence_penalty", request.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", request.frequency_penalty),
        repetition_penalty=_repetition_penalty(request.repetition_penalty),
    )
    if asked == Constraints():
        return None
    in_bad_words = {token for word in asked.bad_words for token in word}
    _check_something_is_left(asked, vocab_size, never_written | in_bad_words, end_token_ids)
    return Constraints(**(vars(asked) | {"end_token_ids": tuple(dict.fromkeys(end_token_ids))}))


def _logit_bias(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for key, value in given.items():
        try:
            token = int(key)
        except ValueError:
            raise out_of_range("logit_bias", "keyed by token ids", key) from None
        if math.isnan(value):
            raise out_of_range("logit_bias", "numbers", value)
        found[token] = min(MAX_BIAS, max(-MAX_BIAS, value))
    _check_vocabulary("logit_bias", list(found), vocab_size)
    return tuple(found.items())


def _allowed(given: Sequence[int] | None, vocab_size: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not given:
        raise RequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
    _check_vocabulary("allowed_token_ids", given, vocab_size)
    return tuple(given)


def _check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            allowed = f"token ids in [0, {vocab_size - 1}], the model's vocabulary"
            raise out_of_range(field, allowed, token)


def _bad_words(
    words: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the beginning of a text and, where that is another first token
    and as many of them, behind a space: vLLM's rule."""
    if len(words) > MAX_BAD_WORDS:
        raise out_of_range("bad_words", f"at most {MAX_BAD_WORDS} words", len(words))
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if len(word) > MAX_BAD_WORD_LENGTH:
            allowed = f"words of at most {MAX_BAD_WORD_LENGTH} characters"
            raise out_of_range("bad_words", allowed, len(word))
        if not word:
            raise RequestError("bad_words cannot contain an empty string.", param="bad_words")
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not bare:
            raise RequestError(
                "bad_words must hold words of at least one token.", param="bad_words"
            )
        found[bare] = None
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            found[spaced] = None
    if len(found) > MAX_BAD_WORDS:
        raise out_of_range("bad_words", f"at most {MAX_BAD_WORDS} runs of tokens", len(found))
    return tuple(found)


def _min_tokens(given: int, max_tokens: int) -> int:
    if not 0 <= given <= max_tokens:
        raise out_of_range("min_tokens", f"in [0, {max_tokens}], the answer's length", given)
    return given


def _penalty(field: str, given: float | None) -> float:
    if given is None:
        return 0.0
    if not -2 <= given <= 2:
        raise out_of_range(field, "in [-2, 2]", given)
    return given


def _repetition_penalty(given: float | None) -> float:
    if given is None:
        return 1.0
    if not 0 < given < math.inf:
        raise out_of_range("repetition_penalty", "a number greater than zero", given)
    return given


def _check_something_is_left(
    asked: Constraints, vocab_size: int, forbidden: frozenset[int], end_token_ids: Sequence[int]
) -> None:
    """Refuse what may leave a position without any token.

    A token of a bad word may be forbidden by its neighbours, so one that is in none must be left.
    """
    if asked.min_tokens:
        forbidden |= frozenset(end_token_ids)
    allowed = range(vocab_size) if asked.allowed_token_ids is None else asked.allowed_token_ids
    if any(token not in forbidden for token in allowed):
        return
    field = "bad_words" if asked.allowed_token_ids is None else "allowed_token_ids"
    raise RequestError(
        f"{field} must leave a token that can always be written: one that is not the mask token, "
        "in no bad word, and no end token where min_tokens forbids it.",
        param=field,
    )
