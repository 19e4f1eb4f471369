"""The messages of the OpenAI protocol: what a request may hold and what an answer looks like.

The requests know every field that vLLM's server knows, so that a wrong type is refused for each of
them; `fields` says which of them do something. Further fields are allowed and ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self, TypedDict, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictStr,
    model_serializer,
    model_validator,
)

from vdiff_kserve.openai.structured_fields import ResponseFormat, StructuredOutputs
from vdiff_kserve.openai.tool_fields import NamedTool, Tool, ToolCall, ToolCallDelta

INT64_MAX = 2**63 - 1
DEFAULT_COMPLETION_TOKENS = 16
"""Length of a completion that sets none, as OpenAI has it."""
TokenId = Annotated[int, Field(ge=0)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""Bounded, since tensors cannot hold what JSON can spell."""

Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""Of a list, one item that is wrong is told: a body has room for millions."""
MAX_LOGIT_BIAS = 1024

FinishReason = Literal["stop", "length", "tool_calls"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")


def _encodable(text: str) -> str:
    """JSON can spell lone surrogates, which are no characters and cannot be sent back."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text has a lone surrogate") from error
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]


class _OmitsAbsent(BaseModel):
    """Leaves its optional fields out of the JSON when they hold nothing."""

    optional: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if v is not None or k not in self.optional}


class ContentPart(_Request):
    """One part of a message; only those that are text can be answered."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None

    @property
    def words(self) -> str | None:
        """The part's text, under the names that OpenAI's endpoints have for it."""
        if self.type == "refusal":
            return self.refusal
        return self.text if self.type in ("text", "input_text", "output_text") else None


class Prediction(_Request):
    """What an answer will probably be."""

    type: Literal["content"] = "content"
    content: Text | ListOf[ContentPart]


class Likelihood(_Request):
    """How the tokens of an echoed prompt are scored."""

    method: Literal["chain", "pseudo", "monte_carlo"] = "chain"
    samples: Int32 = 128
    context: Int32 = 1


def _by_name(value: Any) -> Any:
    """A method may be named alone."""
    return {"method": value} if isinstance(value, str) else value


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must have at most {MAX_LOGIT_BIAS} entries, has {len(value)}")
    return value


class StreamOptions(_Request):
    """What a stream carries beside text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationFields(_Request):
    """What chat and plain completion requests have in common."""

    model: Text | None = None
    n: Int32 | None = 1
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: Text | ListOf[Text] | None = None
    stop_token_ids: ListOf[TokenId] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    ignore_eos: bool = False
    priority: int | None = Field(0, ge=-INT64_MAX - 1, le=INT64_MAX)
    request_id: Text | None = None
    timeout: float | None = None
    prediction: Prediction | None = None
    stream_canvas: bool | None = False

    profile: str | None = None
    policy: str | None = None
    remasking: Literal["low_confidence", "random"] | None = None
    steps: Int32 | None = None
    block_length: Int32 | None = None
    alg_temp: float | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    neighbour_threshold: float | None = None
    radius: Int32 | None = None
    credit_weight: float | None = None
    credit_decay: float | None = None
    credit_power: float | None = None
    edit_threshold: float | None = None
    max_post_edits: Int32 | None = None
    cfg_scale: float | None = None
    logits_eos_inf: bool | None = None
    confidence_eos_eot_inf: bool | None = None
    cache: str | None = None
    use_cache: bool | None = None
    use_dual_cache: bool | None = None
    refresh_interval: Int32 | None = None
    vicinity: Int32 | None = None
    max_lookahead: Int32 | None = None
    apd: bool | None = None
    apd_mixture_weight: float | None = None
    apd_window: Int32 | None = None
    apd_lookahead: Int32 | None = None
    apd_max_parallel: Int32 | None = None
    apd_threshold: float | None = None

    allowed_token_ids: ListOf[TokenId] | None = None
    bad_words: ListOf[str] | None = None
    best_of: int | None = None
    cache_salt: str | None = None
    frequency_penalty: float | None = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    include_stop_str_in_output: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None
    length_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few_biases)] | None = None
    min_p: float | None = None
    min_tokens: int | None = 0
    presence_penalty: float | None = None
    prompt_logprobs: int | None = None
    repetition_detection: dict[str, Any] | None = None
    repetition_penalty: float | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = None
    top_k: Int32 | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    truncation_side: Literal["left", "right"] | None = None
    use_beam_search: bool | None = False
    user: str | None = None
    vllm_xargs: dict[str, Any] | None = None


class CompletionRequest(GenerationFields):
    """The body of `POST completions`."""

    prompt: Text | ListOf[Text] | ListOf[TokenId] | ListOf[ListOf[TokenId]] | None = None
    max_tokens: Int32 | None = DEFAULT_COMPLETION_TOKENS
    add_special_tokens: bool = True

    echo: bool | None = False
    logprobs: int | None = None
    prompt_embeds: str | ListOf[str] | None = None
    suffix: Text | None = None
    infill: bool | None = False
    infill_lengths: ListOf[Int32] | None = None
    likelihood: Annotated[Likelihood, BeforeValidator(_by_name)] | None = None


class ChatMessageParam(_Request):
    """One message of a conversation."""

    role: str
    content: str | ListOf[ContentPart] | None = None
    refusal: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _take_refusal(self) -> Self:
        """What the assistant refused with is what it said."""
        if self.content is None and self.refusal is not None:
            self.content = self.refusal
        return self


class ChatCompletionRequest(GenerationFields):
    """The body of `POST chat/completions`."""

    messages: ListOf[ChatMessageParam]
    max_tokens: Int32 | None = None
    max_completion_tokens: Int32 | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    audio: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = False
    function_call: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    include_reasoning: bool | None = True
    logprobs: bool | None = False
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    modalities: ListOf[str] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    return_prompt_text: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: ListOf[Tool] | None = None
    top_logprobs: int | None = 0
    web_search_options: dict[str, Any] | None = None


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """What became of a predicted answer's tokens."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=PromptTokensDetails)
    completion_tokens_details: CompletionTokensDetails | None = None


class Passes(BaseModel):
    """Forward passes by kind; all but `auxiliary` are of the diffusion model."""

    refresh: int
    reuse: int
    commit: int
    auxiliary: int


class ChoiceCost(BaseModel):
    """What one answer cost; `nfe` counts the diffusion model's forward passes."""

    nfe: int
    passes: Passes
    steps: int
    tokens_per_forward: float


class DiffusionInfo(_OmitsAbsent, ChoiceCost):
    """What a response cost, and how it was decoded; per choice when there are several."""

    optional = frozenset({"choices", "encoder_passes"})

    decoding: dict[str, Any]
    encoder_passes: int | None = None
    choices: list[ChoiceCost] | None = None


class StepInfo(BaseModel):
    """What one denoising step wrote: places in the answer, the tokens' texts, and how likely each
    was; and the places whose tokens it took back."""

    step: int
    positions: list[int]
    text: list[str]
    confidence: list[float]
    masks: int
    masked_again: list[int]


def _now() -> int:
    return int(time.time())


class _Response(BaseModel):
    id: str
    created: int = Field(default_factory=_now)
    model: str
    system_fingerprint: str | None = None


class ChatTopLogprob(BaseModel):
    """One of the likeliest tokens of a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatTopLogprob):
    """One token of an answer and the likeliest in its place."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """How likely the tokens of a chat's answer were, each when it was committed."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(BaseModel):
    """The same of a completion, a list per fact; null for a prompt's token that is not scored."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class ChatMessage(_OmitsAbsent):
    """The answer of a chat; without content when it calls functions and says nothing else."""

    optional = frozenset({"tool_calls"})

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_OmitsAbsent):
    """One answer of a chat."""

    optional = frozenset({"token_ids"})

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(_OmitsAbsent, _Response):
    """The response of `POST chat/completions`."""

    optional = frozenset({"prompt_token_ids", "prompt_text"})

    object: Literal["chat.completion"] = "chat.completion"
    choices: Sequence[ChatChoice]
    service_tier: None = None
    usage: Usage
    vdiff: DiffusionInfo
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None


class Chunk(TypedDict):
    """What every chunk of a stream has. Chunks are dictionaries, which are written in an eighth of
    the time that models take; keys are in the order of the JSON."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatDelta(TypedDict, total=False):
    """New text of an answer; the role comes with the first."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    """New text of one answer of a chat; a fill-in-the-middle completion tells its text twice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    text: NotRequired[str]


class ChatCompletionChunk(Chunk):
    """One chunk of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage]
    vdiff: NotRequired[DiffusionInfo | StepInfo]
    prompt_token_ids: NotRequired[list[int]]
    prompt_text: NotRequired[str]


class CompletionChoice(_OmitsAbsent):
    """One answer."""

    optional = frozenset({"token_ids", "prompt_token_ids", "holes"})

    index: int
    text: str
    holes: list[str] | None = None
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Response):
    """The response of `POST completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    service_tier: None = None
    usage: Usage
    vdiff: DiffusionInfo


class CompletionChunkChoice(TypedDict):
    """New text of one answer."""

    index: int
    text: str
    holes: NotRequired[list[str]]
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionChunk(Chunk):
    """One chunk of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage]
    vdiff: NotRequired[DiffusionInfo | StepInfo]


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """The body of every refusal."""

    error: ErrorInfo


class ModelCard(BaseModel):
    """One entry of the model list."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=_now)
    owned_by: str = "vdiff_kserve"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """Every model, in OpenAI's shape and (`models`) in KServe V1's."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[str] = Field(default_factory=list)
