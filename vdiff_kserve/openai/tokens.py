"""`/tokenize` and `/detokenize`, with vLLM's messages."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import (
    RequestError,
    invalid_body,
    nesting_refused,
    told_as_request_error,
)
from vdiff_kserve.openai.fields import refuse_unsupported
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.prompts import chat_prompt
from vdiff_kserve.openai.protocol import ChatCompletionRequest, ChatMessageParam, Text

Result = TypeVar("Result")
OWN_FIELDS = frozenset(("prompt", "return_token_strs"))
"""Fields that a chat request does not have."""


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`: a prompt, or messages and what chat has beside them.

    `add_special_tokens` is true for a prompt and false for messages, unless it is given.
    """

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessageParam] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class TokenizeResponse(BaseModel):
    """Token ids, how many there are, and how many a request may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]


class DetokenizeResponse(BaseModel):
    """The text of token ids; ids that the model does not have give none."""

    prompt: str


class Tokens:
    """Tokenizes on a thread of its own, with a tokenizer of its own: long texts take seconds, and a
    tokenizer serves one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vdiff-tokens")

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a prompt or a conversation.

        Raises:
            RequestError: there is neither, or the chat template refuses.
        """
        return await self._run(lambda: self._tokenize(request))

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of tokens, special ones included."""
        return await self._run(
            lambda: DetokenizeResponse(prompt=str(self._tokenizer.decode(request.tokens)))
        )

    async def _run(self, work: Callable[[], Result]) -> Result:
        with told_as_request_error(), nesting_refused():
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("Give either prompt or messages.", param="prompt")
        if request.prompt is None:
            ids = list(chat_prompt(_as_chat(request), self._tokenizer, self._limits))
        else:
            special = request.add_special_tokens is not False
            ids = self._tokenizer.encode(request.prompt, add_special_tokens=special)
        names = self._tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return TokenizeResponse(
            count=len(ids),
            max_model_len=self._limits.max_model_len,
            tokens=ids,
            token_strs=names,
        )


def _as_chat(request: TokenizeRequest) -> ChatCompletionRequest:
    fields = request.model_dump(exclude_unset=True, exclude=set(OWN_FIELDS))
    if fields.get("add_special_tokens") is None:
        fields.pop("add_special_tokens", None)
    try:
        chat = ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_body(error.errors()) from error
    refuse_unsupported(chat)
    return chat
