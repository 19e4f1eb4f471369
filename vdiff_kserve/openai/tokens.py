"""`/tokenize` and `/detokenize`, with vLLM's messages, and the count of a response's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import (
    RequestError,
    invalid_part,
    nesting_refused,
    told_as_request_error,
)
from vdiff_kserve.openai.fields import refuse_unsupported
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.prompts import chat_prompt
from vdiff_kserve.openai.protocol import ChatCompletionRequest, ChatMessageParam, ListOf, Text
from vdiff_kserve.openai.response_input import as_chat, in_own_names
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.tokenizer_thread import TokenizerThread

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
    messages: ListOf[ChatMessageParam] | None = None
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
    tokens: ListOf[Annotated[int, Field(ge=0, le=2**31 - 1)]]


class DetokenizeResponse(BaseModel):
    """The text of token ids; ids that the model does not have give none."""

    prompt: str


class InputTokens(BaseModel):
    """The response of `POST responses/input_tokens`."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Tokens:
    """What these routes answer."""

    def __init__(self, thread: TokenizerThread, limits: ServingLimits) -> None:
        self._thread = thread
        self._limits = limits

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a prompt or a conversation.

        Raises:
            RequestError: there is neither, or the chat template refuses.
        """
        return await self._run(lambda tokenizer: self._tokenize(request, tokenizer))

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of tokens, special ones included."""
        return await self._run(
            lambda tokenizer: DetokenizeResponse(prompt=str(tokenizer.decode(request.tokens)))
        )

    async def count(self, request: ResponsesRequest) -> InputTokens:
        """How many tokens the input of a response has, with all that the model is told.

        Raises:
            RequestError: the route could not answer it, or the chat template refuses.
        """
        return await self._run(lambda tokenizer: self._count(request, tokenizer))

    async def _run(self, work: Callable[[PreTrainedTokenizerFast], Result]) -> Result:
        with told_as_request_error(), nesting_refused():
            return await self._thread.run(work)

    def _tokenize(
        self, request: TokenizeRequest, tokenizer: PreTrainedTokenizerFast
    ) -> TokenizeResponse:
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("Give either prompt or messages.", param="prompt")
        if request.prompt is None:
            ids = list(chat_prompt(_as_chat(request), tokenizer, self._limits))
        else:
            special = request.add_special_tokens is not False
            ids = tokenizer.encode(request.prompt, add_special_tokens=special)
        names = tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return TokenizeResponse(
            count=len(ids),
            max_model_len=self._limits.max_model_len,
            tokens=ids,
            token_strs=names,
        )

    def _count(self, request: ResponsesRequest, tokenizer: PreTrainedTokenizerFast) -> InputTokens:
        chat = as_chat(request)
        with in_own_names():
            refuse_unsupported(chat)
            ids = chat_prompt(chat, tokenizer, self._limits)
        return InputTokens(input_tokens=len(ids))


def _as_chat(request: TokenizeRequest) -> ChatCompletionRequest:
    fields = request.model_dump(exclude_unset=True, exclude=set(OWN_FIELDS))
    if fields.get("add_special_tokens") is None:
        fields.pop("add_special_tokens", None)
    try:
        chat = ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_part(error.errors()) from error
    refuse_unsupported(chat)
    return chat
