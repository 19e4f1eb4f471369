"""The messages of OpenAI's Responses API: what a request may hold, and responses and their events.

Only what a model that writes text can need: messages, and calls of functions.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from vdiff_kserve.openai.protocol import (
    ChatTokenLogprob,
    DiffusionInfo,
    GenerationFields,
    Int32,
    ListOf,
    Text,
)

ANYTHING = TypeAdapter(Any)


def _tellable(value: Any) -> Any:
    """Requests can spell what no answer may hold: lone surrogates, numbers that are none, and
    nesting that is too deep to write."""
    try:
        json.dumps(value, allow_nan=False)
        ANYTHING.dump_json([[[value]]])  # as deep as it will be in an event
    except (ValueError, RecursionError) as error:
        raise ValueError("must be JSON that can be told again") from error
    return value


Told = AfterValidator(_tellable)
"""A field that the response tells again."""
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponsesRequest(GenerationFields):
    """The body of `POST responses`: OpenAI's fields, and those that chats have beside OpenAI's."""

    input: Text | ListOf[dict[str, Any]] | None = None
    instructions: Text | None = None
    max_output_tokens: Int32 | None = None
    text: Annotated[dict[str, Any] | None, Told] = None
    tools: Annotated[ListOf[dict[str, Any]] | None, Told] = None
    tool_choice: Annotated[str | dict[str, Any] | None, Told] = None
    parallel_tool_calls: bool | None = True
    include: ListOf[str] | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    background: bool | None = False
    conversation: str | dict[str, Any] | None = None
    metadata: Annotated[dict[str, Any] | None, Told] = None
    previous_response_id: str | None = None
    prompt: dict[str, Any] | None = None
    reasoning: Annotated[dict[str, Any] | None, Told] = None
    store: bool | None = False
    truncation: str | None = None
    user: Text | None = None


class TokenLogprob(BaseModel):
    """How likely a token was when it was committed."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TokenLogprob] | None = None

    @classmethod
    def of_chat(cls, told: ChatTokenLogprob) -> TokenLogprob:
        """What a chat tells of the token."""
        top = [
            cls(token=each.token, bytes=each.bytes or [], logprob=each.logprob)
            for each in told.top_logprobs
        ]
        return cls(token=told.token, bytes=told.bytes or [], logprob=told.logprob, top_logprobs=top)


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class OutputMessage(BaseModel):
    """A message that the model wrote."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputFunctionCall(BaseModel):
    """A call of a function; `arguments` is JSON text."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = OutputMessage | OutputFunctionCall


class InputTokensDetails(BaseModel):
    """Where the input's tokens came from."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What the output's tokens were; the models do not reason apart from their answers."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens that a response cost."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = Field(default_factory=OutputTokensDetails)
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(BaseModel):
    """Why a response failed after it had begun."""

    code: Literal["server_error"] = "server_error"
    message: str


class ResponseObject(BaseModel):
    """The response of `POST responses`. What was asked for is told again, as OpenAI does."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    vdiff: DiffusionInfo | None = None
