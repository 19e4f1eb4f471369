"""What a request knows of its answer beforehand: predicted outputs, and vLLM's canvas arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import RequestError, out_of_range
from vdiff_kserve.openai.fields import PINNED, SEED_CANVAS, XARGS
from vdiff_kserve.openai.limits import ServingLimits, check_token_ids
from vdiff_kserve.openai.prompts import encode
from vdiff_kserve.openai.protocol import GenerationFields

Foreknown = tuple[tuple[int, ...], tuple[int, ...]]
"""What answers probably are, and what of them stands from the beginning; -1 for what is unknown."""


def foreknown(
    request: GenerationFields,
    tokenizer: PreTrainedTokenizerFast,
    limits: ServingLimits,
    mask_token_id: int | None,
) -> Foreknown:
    """The draft of the request's answers and the tokens that are pinned in them.

    Raises:
        RequestError: a value that is wrong, or that the model cannot take.
    """
    seeded = request.vllm_xargs or {}
    if unknown := sorted(seeded.keys() - set(XARGS)):
        raise RequestError(
            f"vllm_xargs.{unknown[0]} is not supported; known are {', '.join(XARGS)}.",
            param="vllm_xargs",
        )
    if request.prediction is not None and SEED_CANVAS in seeded:
        raise RequestError(
            f"prediction and vllm_xargs.{SEED_CANVAS} cannot be given together.", param="prediction"
        )
    if SEED_CANVAS in seeded or PINNED in seeded:
        return _from_canvas(seeded, limits, mask_token_id)
    return (_predicted(request, tokenizer, limits), ())


def _predicted(
    request: GenerationFields, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits
) -> tuple[int, ...]:
    if request.prediction is None:
        return ()
    content = request.prediction.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    "prediction.content must be text or a list of text parts.", param="prediction"
                )
        content = "".join(part.text or "" for part in content)
    ids = encode(tokenizer, content, add_special_tokens=False)[: limits.max_model_len]
    check_token_ids("prediction", ids, limits)
    return ids


def _from_canvas(
    seeded: Mapping[str, Any], limits: ServingLimits, mask_token_id: int | None
) -> Foreknown:
    canvas, pins = seeded.get(SEED_CANVAS), seeded.get(PINNED, [])
    if not _are_integers(canvas) or len(canvas) > limits.max_model_len:
        allowed = f"a list of at most {limits.max_model_len} token ids"
        raise out_of_range(f"vllm_xargs.{SEED_CANVAS}", allowed, canvas)
    check_token_ids("vllm_xargs", canvas, limits)
    if not _are_integers(pins) or not all(0 <= pin < len(canvas) for pin in pins):
        allowed = f"a list of places in the canvas, in [0, {len(canvas) - 1}]"
        raise out_of_range(f"vllm_xargs.{PINNED}", allowed, pins)
    if pins and (limits.traits.block_causal or limits.traits.renoises):
        raise RequestError(
            f"vllm_xargs.{PINNED} is not supported by this model: its blocks see only themselves "
            "and all to their left.",
            param="vllm_xargs",
        )
    held = set(pins)
    if any(canvas[pin] == mask_token_id for pin in held):
        raise RequestError(
            f"vllm_xargs.{PINNED} pins a place where {SEED_CANVAS} has the mask token.",
            param="vllm_xargs",
        )
    pinned = tuple(token if i in held else -1 for i, token in enumerate(canvas)) if held else ()
    free = (-1 if i in held or t == mask_token_id else t for i, t in enumerate(canvas))
    return tuple(free), pinned


def check_something_is_left(pinned: tuple[int, ...], length: int) -> None:
    """Refuse an answer of which every token is pinned.

    Args:
        length: tokens of the answer.

    Raises:
        RequestError: there is nothing to write.
    """
    if pinned and len(pinned) >= length and all(token >= 0 for token in pinned[:length]):
        raise RequestError(
            f"vllm_xargs.{PINNED} leaves nothing to write in an answer of {length} tokens.",
            param="vllm_xargs",
        )


def _are_integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )
