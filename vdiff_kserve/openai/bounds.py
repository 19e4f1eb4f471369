"""How much one request may hold: checked before any of it costs time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.limits import ServingLimits, stop_strings, too_many_characters
from vdiff_kserve.openai.protocol import (
    ChatCompletionRequest,
    ChatMessageParam,
    CompletionRequest,
    Prediction,
)

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
"""Characters of one stop string."""
MAX_STOP_TOKEN_IDS = 1024


def check_bounds(
    request: ChatCompletionRequest | CompletionRequest, limits: ServingLimits, longest_token: int
) -> None:
    """Refuse a request that holds more than the server would ever work on.

    Args:
        longest_token: characters of the longest token, which tells how many tokens a text has at
            least without tokenizing it.

    Raises:
        RequestError: naming the field and how much is allowed.
    """
    stops = stop_strings(request)
    if len(stops) > MAX_STOP_STRINGS:
        raise _too_many("stop", MAX_STOP_STRINGS, "strings", len(stops))
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        longest = max(len(stop) for stop in stops)
        raise _too_many("stop", MAX_STOP_LENGTH, "characters in each string", longest)
    ids = request.stop_token_ids or ()
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _too_many("stop_token_ids", MAX_STOP_TOKEN_IDS, "ids", len(ids))
    _check_answers(request, limits)
    for text in _texts(request):
        if text > limits.max_model_len * longest_token:
            raise too_many_characters(text, limits)


def tokenized_characters(request: ChatCompletionRequest | CompletionRequest) -> int:
    """How long the texts are that a request has tokenized, with all that a template may write."""
    if isinstance(request, CompletionRequest):
        return sum(_texts(request))
    written = [request.messages, request.tools, request.chat_template_kwargs, request.prediction]
    return _characters(written)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, BaseModel | Mapping):
        return sum(_characters(each) for each in dict(value).values())
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _too_many(field: str, most: int, noun: str, given: int) -> RequestError:
    return RequestError(f"{field} must have at most {most} {noun}, got {given}.", param=field)


def _check_answers(
    request: ChatCompletionRequest | CompletionRequest, limits: ServingLimits
) -> None:
    prompt = request.prompt if isinstance(request, CompletionRequest) else None
    one = not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int)
    answers = (request.n or 1) * (1 if one else len(prompt or ()))
    if answers > limits.max_choices:
        raise RequestError(
            f"n times the number of prompts must be at most {limits.max_choices}, got {answers}.",
            param="prompt",
        )


def _texts(request: ChatCompletionRequest | CompletionRequest) -> list[int]:
    """Characters of each text that would be tokenized."""
    if isinstance(request, CompletionRequest):
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        texts = [*prompts, request.suffix, *_contents([request.prediction])]
        return [len(text) for text in texts if isinstance(text, str)]
    messages = sum(map(len, _contents(request.messages)))
    return [messages, *map(len, _contents([request.prediction]))]


def _contents(of: Sequence[ChatMessageParam | Prediction | None]) -> list[str]:
    """The texts of messages, or of a prediction."""
    contents = [each.content for each in of if each is not None]
    parts = [part.words or "" for each in contents if isinstance(each, list) for part in each]
    return parts + [each for each in contents if isinstance(each, str)]
