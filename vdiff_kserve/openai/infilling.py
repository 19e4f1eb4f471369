"""Texts with holes: what a request says of them, and the canvases that they become."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import RequestError, out_of_range
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.prompts import TokenIds, encode
from vdiff_kserve.openai.protocol import CompletionRequest

HOLE = re.compile(r"<\|mask:(\d{1,9})\|>")
"""A hole of so many tokens in the prompt of a request that says `infill`."""
MAX_HOLES = 64
MAX_INFILL_LENGTHS = 32
AUTOMATIC_LENGTHS = 12
"""How many lengths of a hole are tried when a request names none, at most."""

Given = tuple[int, ...]
"""Tokens behind the prompt that stand from the beginning, -1 for a mask."""


@dataclass(frozen=True)
class Infilling:
    """What one prompt's canvas holds beside the prompt.

    Attributes:
        candidates: the canvases to try, of which the best is answered; each begins with a hole.
        texts: the text before each hole and behind the last; empty for a suffix, where the answer
            is what fills the hole.
        longest: tokens of the longest hole that the request allows.
    """

    candidates: tuple[Given, ...]
    texts: tuple[str, ...] = ()
    longest: int = 0

    @property
    def given_tokens(self) -> int:
        """Tokens of the given text behind the prompt."""
        return sum(token >= 0 for token in self.candidates[0])

    @property
    def lengths(self) -> list[int]:
        """Masks of each candidate."""
        return [sum(token < 0 for token in given) for given in self.candidates]


def check_infilling(request: CompletionRequest, limits: ServingLimits) -> None:
    """Refuse what cannot go together with holes.

    Raises:
        RequestError: naming the field at fault.
    """
    field = "suffix" if request.suffix else "infill"
    if not request.suffix and request.infill_lengths is not None:
        raise RequestError("infill_lengths needs a suffix.", param="infill_lengths")
    if not request.suffix and not request.infill:
        return
    if request.suffix and request.infill:
        raise RequestError("suffix and infill cannot be given together.", param="infill")
    if limits.traits.block_causal or limits.traits.renoises:
        raise RequestError(
            f"`{field}` is not supported by this model: its blocks see only themselves and all to "
            "their left, so that it would write without regard to the text behind the hole.",
            param=field,
        )
    others: dict[str, object] = {
        "prediction": request.prediction,
        "vllm_xargs": request.vllm_xargs,
    }
    if request.infill:
        others |= {"echo": request.echo, "logprobs": request.logprobs is not None}
    for name, value in others.items():
        if value:
            raise RequestError(f"{name} cannot be given together with {field}.", param=name)


def suffix_infilling(
    request: CompletionRequest,
    tokenizer: PreTrainedTokenizerFast,
    longest: int,
    most_candidates: int,
) -> Infilling:
    """A hole between the prompt and a suffix, in the lengths to try.

    Args:
        longest: tokens of the hole, at most.
        most_candidates: lengths that automatic ones may come to.

    Raises:
        RequestError: a length out of range.
    """
    suffix = encode(tokenizer, request.suffix or "", add_special_tokens=False)
    shortest = min(max(1, request.min_tokens or 0), longest)
    if request.infill_lengths is None:
        lengths = automatic_lengths(shortest, longest, min(AUTOMATIC_LENGTHS, most_candidates))
    else:
        lengths = sorted(set(request.infill_lengths))
        if not 1 <= len(lengths) <= MAX_INFILL_LENGTHS:
            allowed = f"1 to {MAX_INFILL_LENGTHS} different lengths"
            raise out_of_range("infill_lengths", allowed, len(lengths))
        if not shortest <= lengths[0] <= lengths[-1] <= longest:
            allowed = f"lengths in [{shortest}, {longest}], the room for the hole"
            raise out_of_range("infill_lengths", allowed, lengths)
    candidates = tuple((-1,) * length + suffix for length in lengths)
    return Infilling(candidates, longest=longest)


def automatic_lengths(shortest: int, longest: int, count: int) -> list[int]:
    """At most `count` lengths between the two: all of them, or ones that are equally far apart as
    ratios."""
    if longest - shortest < count:
        return list(range(shortest, longest + 1))
    if count == 1:
        return [longest]
    ratio = longest / shortest
    return sorted({round(shortest * ratio ** (i / (count - 1))) for i in range(count)})


def holes_of(
    text: str, tokenizer: PreTrainedTokenizerFast, room: int, *, add_special_tokens: bool
) -> tuple[TokenIds, Infilling]:
    """A prompt with marked holes: the tokens before the first, and all behind them.

    Args:
        room: tokens that all of it may have.

    Raises:
        RequestError: there is no hole, or too many, or one without a place of its own, or no room.
    """
    pieces = HOLE.split(text)
    texts, sizes = pieces[::2], [int(size) for size in pieces[1::2]]
    if not 1 <= len(sizes) <= MAX_HOLES:
        raise RequestError(
            f"prompt must have 1 to {MAX_HOLES} holes, written <|mask:n|>, but has {len(sizes)}.",
            param="prompt",
        )
    if min(sizes) < 1:
        raise RequestError("prompt has a hole of 0 tokens.", param="prompt")
    if not all(texts[1:-1]):
        raise RequestError("prompt has two holes without text between them.", param="prompt")
    if sum(sizes) >= room:
        raise _no_room(sum(sizes), room)
    before, *behind = [
        encode(tokenizer, part, add_special_tokens=add_special_tokens and i == 0)
        for i, part in enumerate(texts)
    ]
    given: list[int] = []
    for size, part in zip(sizes, behind, strict=True):
        given += [*(-1,) * size, *part]
    if len(before) + len(given) > room:
        raise _no_room(len(before) + len(given), room)
    return before, Infilling((tuple(given),), texts=tuple(texts), longest=max(sizes))


def _no_room(tokens: int, room: int) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {room + 1} tokens, one of them the text's "
        f"beginning. However, your prompt has {tokens} tokens with its holes.",
        param="input_tokens",
    )


def with_beginning(prompt: TokenIds, tokenizer: PreTrainedTokenizerFast) -> TokenIds:
    """The prompt, or what a text begins with where nothing stands before a hole."""
    if prompt:
        return prompt
    begin = tokenizer.bos_token_id
    return (tokenizer.eos_token_id if begin is None else begin,)
