"""What a request may ask for: the ranges of its numbers, and the decoding they stand for."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vdiff_kserve.openai.decoding import REQUEST_FIELDS, ModelTraits, resolve
from vdiff_kserve.openai.errors import RequestError, out_of_range
from vdiff_kserve.openai.fields import MAX_STEPS, refuse_unsupported
from vdiff_kserve.openai.protocol import (
    INT64_MAX,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)
from vdiff_kserve.openai.tool_parsers import ParserName
from vdiff_kserve.sampler import MAX_TOP_LOGPROBS, DecodingParams


@dataclass(frozen=True)
class ServingLimits:
    """The server's side of a request: what it allows and what it takes when nothing is said.

    Attributes:
        max_model_len: most tokens of prompt and answer together.
        default_max_tokens: answer length of a request in which it is null; a completion that does
            not name it has OpenAI's 16.
        max_choices: most answers that one request may ask for, over all its prompts.
        vocab_size: token ids lie below it.
        decoding: the decoding of a request that says nothing about it.
        profiles: the decodings that a request may name.
        traits: what the model allows.
        request_timeout: seconds that a request may take which sets no timeout; None is for ever.
        max_schema_bytes: longest schema or grammar that an answer may have to match.
        grammar_timeout: seconds that compiling one may take.
        auto_tool_choice: whether a model may choose itself to call a function.
        tool_call_parser: how calls are written.
        tools_in_prompt: whether models are told of functions whose template does not do that.
        template_takes_tools: whether the chat template does.
    """

    max_model_len: int
    default_max_tokens: int
    max_choices: int
    vocab_size: int
    decoding: DecodingParams
    profiles: Mapping[str, DecodingParams]
    traits: ModelTraits
    request_timeout: float | None = None
    max_schema_bytes: int = 2**16
    grammar_timeout: float = 5.0
    auto_tool_choice: bool = True
    tool_call_parser: ParserName = "hermes"
    tools_in_prompt: bool = True
    template_takes_tools: bool = False


def check(request: GenerationFields, limits: ServingLimits) -> None:
    """Refuse fields that this server does not have and numbers outside their range.

    Raises:
        RequestError: naming the field and what is allowed.
    """
    if request.n is not None and not 1 <= request.n <= limits.max_choices:
        raise out_of_range("n", f"in [1, {limits.max_choices}]", request.n)
    _check_choices(request, limits)
    if request.timeout is not None and not 0 < request.timeout < math.inf:
        raise out_of_range("timeout", "a number of seconds above 0", request.timeout)
    if any(not stop for stop in stop_strings(request)):
        raise RequestError("stop cannot contain an empty string.", param="stop")
    check_token_ids("stop_token_ids", request.stop_token_ids or (), limits)
    for field in ("stream_options", "stream_canvas"):
        if getattr(request, field) and not request.stream:
            raise RequestError(f"{field} can only be given when stream is true.", param=field)
    refuse_unsupported(request)


def _check_choices(request: GenerationFields, limits: ServingLimits) -> None:
    draws = "random" in (request.remasking, request.policy) or request.alg_temp
    draws = draws or limits.traits.renoises
    if (request.n or 1) > 1 and request.temperature == 0 and not draws:
        raise RequestError(
            f"n must be 1 when temperature is 0, since all answers would be the same, "
            f"got {request.n}.",
            param="n",
        )


def check_token_ids(field: str, ids: Sequence[int], limits: ServingLimits) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        RequestError: naming the id.
    """
    for token_id in ids:
        if token_id >= limits.vocab_size:
            raise RequestError(
                f"{field}: token id {token_id} is out of vocabulary; ids are in "
                f"[0, {limits.vocab_size - 1}].",
                param=field,
            )


def too_many_characters(count: int, limits: ServingLimits) -> RequestError:
    """A prompt is longer than the context, whatever its tokens are."""
    return RequestError(
        f"This model's maximum context length is {limits.max_model_len} tokens. However, your "
        f"prompt has {count} characters, which cannot be so few tokens.",
        param="input_tokens",
    )


def stop_strings(request: GenerationFields) -> tuple[str, ...]:
    """The request's stop strings."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def length_field(request: CompletionRequest | ChatCompletionRequest) -> str:
    """The field that says how long the request's answers may be."""
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens"
    return "max_tokens"


def answer_length(
    request: CompletionRequest | ChatCompletionRequest, prompt_length: int, limits: ServingLimits
) -> int:
    """Masked positions after a prompt: what the request asks for, cut to what fits the context,
    as vLLM has it.

    Raises:
        RequestError: the prompt leaves no room, or the asked length is out of range.
    """
    most = limits.max_model_len
    field = length_field(request)
    wanted = getattr(request, field)
    scores = isinstance(request, CompletionRequest) and request.echo and not request.suffix
    least = 0 if scores else 1
    if wanted == 0 and not scores and isinstance(request, CompletionRequest):
        raise RequestError(
            f"{field} must be in [1, {most}], the model's context length; 0 is for completions "
            "with echo and without suffix, which tell or score the prompt alone.",
            param=field,
        )
    if wanted is not None and not least <= wanted <= most:
        raise out_of_range(field, f"in [{least}, {most}], the model's context length", wanted)
    if wanted == 0 and prompt_length <= most:
        return 0
    if prompt_length >= most:
        raise RequestError(
            f"This model's maximum context length is {most} tokens. However, your prompt has "
            f"{prompt_length} tokens and the answer needs at least one. Shorten the prompt.",
            param="input_tokens",
        )
    return min(wanted_length(request, limits), most - prompt_length)


def wanted_length(request: CompletionRequest | ChatCompletionRequest, limits: ServingLimits) -> int:
    """How long the answers may be if there is room."""
    wanted: int | None = getattr(request, length_field(request))
    return limits.default_max_tokens if wanted is None else wanted


def room_beside_answer(
    request: CompletionRequest | ChatCompletionRequest, limits: ServingLimits
) -> int:
    """Tokens that a prompt may have which leaves room for the answer: for as much as the request
    asks for, or for half of the context where it asks for nothing and the default is longer."""
    wanted = wanted_length(request, limits)
    if getattr(request, length_field(request)) is None:
        wanted = min(wanted, limits.max_model_len // 2)
    return max(1, limits.max_model_len - max(1, wanted))


def time_allowed(request: GenerationFields, limits: ServingLimits) -> float | None:
    """Seconds that a request may take: its own or the server's, the shorter; None is for ever."""
    given = [each for each in (request.timeout, limits.request_timeout) if each is not None]
    return min(given, default=None)


def decoding_params(request: GenerationFields, limits: ServingLimits) -> DecodingParams:
    """How the first answer is decoded; further ones differ in their seed only.

    What the request does not say is the server's default.

    Raises:
        RequestError: a decoding field out of range, or fields that contradict each other.
    """
    given = {name: getattr(request, name) for name in request.model_fields_set & REQUEST_FIELDS}
    if (steps := (request.vllm_xargs or {}).get(MAX_STEPS)) is not None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise out_of_range(f"vllm_xargs.{MAX_STEPS}", "a positive integer", steps)
        given.setdefault("steps", steps)
    params = resolve(given, limits.decoding, limits.profiles, limits.traits)
    has_masks = not (limits.traits.autoregressive or limits.traits.renoises)
    if request.ignore_eos and has_masks:
        # Else the rest of the answer would be end-of-text tokens, whole blocks of them in one step.
        params = replace(params, logits_eos_inf=True)
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        if (value := getattr(request, name)) is not None:
            if value and not has_masks:
                raise RequestError(f"{name} is for models with a mask token.", param=name)
            params = replace(params, **{name: value})
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    return replace(params, seed=seed, top_logprobs=wanted_logprobs(request))


def wanted_logprobs(request: GenerationFields) -> int | None:
    """How many of the likeliest tokens to tell beside each token's log probability; None is none.

    Raises:
        RequestError: more than there may be, or a number of them without log probabilities.
    """
    field, count = "logprobs", getattr(request, "logprobs", None)
    if isinstance(request, ChatCompletionRequest):
        field, count = "top_logprobs", request.top_logprobs or 0
        if not request.logprobs:
            if count:
                raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
            return None
    if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
        message = f"{field} must be an integer from 0 to {MAX_TOP_LOGPROBS}, got {count}."
        raise RequestError(message, param="logprobs")  # vLLM's, for both fields
    return count


def with_seed_of(params: DecodingParams, choice: int) -> DecodingParams:
    """The decoding of answer number `choice`: seeds count up and wrap in 64 bits."""
    seed = (params.seed + choice + INT64_MAX + 1) % 2**64 - INT64_MAX - 1
    return replace(params, seed=seed)
