"""From a request to a job: every check, prompts and canvases, decoding, what answers must match."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine import GenerationEngine, Grammars
from vdiff_kserve.openai.bounds import check_bounds, tokenized_characters
from vdiff_kserve.openai.canvas import Canvases, canvases_of
from vdiff_kserve.openai.constraints import constraints_of
from vdiff_kserve.openai.decoding import report
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.job import Job, Output
from vdiff_kserve.openai.likelihood import scorer_of
from vdiff_kserve.openai.limits import (
    ServingLimits,
    check,
    decoding_params,
    length_field,
    stop_strings,
    time_allowed,
    wanted_length,
    wanted_logprobs,
)
from vdiff_kserve.openai.prediction import check_something_is_left, foreknown
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.request_ids import clean_id, new_id
from vdiff_kserve.openai.structured import AnswerFormat, FormatCompiler, answer_format
from vdiff_kserve.openai.tokenizer_thread import TokenizerThread
from vdiff_kserve.openai.tools import ToolUse, calls_or, forced_calls, tool_use
from vdiff_kserve.sampler import DecodingParams

MAX_CHARACTERS_AT_ONCE = 8192
"""Of a request that is tokenized on the loop, in a few milliseconds: less than a round takes."""


class Intake:
    """Makes jobs of the requests to one model, or refuses them.

    Args:
        thread: tokenizes long texts.
        name: of the model, for requests that name none.
        grammars: compiles what answers must match; None refuses requests that ask for that.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: PreTrainedTokenizerFast,
        thread: TokenizerThread,
        limits: ServingLimits,
        name: str,
        grammars: Grammars | None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._thread = thread
        self._limits = limits
        self._name = name
        self._formats = FormatCompiler(grammars, limits.grammar_timeout)
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    async def job(self, request: ChatCompletionRequest | CompletionRequest) -> Job:
        """What a request comes to. What its answers must match is compiled, and a long prompt
        tokenized, while the loop goes on.

        Raises:
            RequestError: it is refused.
        """
        arrived = time.monotonic()
        if (wanted := self._format(request)) is not None:
            room = min(wanted_length(request, self._limits), self._limits.max_model_len)
            await self._formats.compile(wanted, room)
        if tokenized_characters(request) <= MAX_CHARACTERS_AT_ONCE:
            return self._read(request, wanted, arrived, self._tokenizer)
        return await self._thread.run(partial(self._read, request, wanted, arrived))

    def _read(
        self,
        request: ChatCompletionRequest | CompletionRequest,
        wanted: AnswerFormat | None,
        arrived: float,
        tokenizer: PreTrainedTokenizerFast,
    ) -> Job:
        check(request, self._limits)
        check_bounds(request, self._limits, self._longest_token)
        most = self._limits.max_model_len * self._longest_token
        canvases = canvases_of(request, tokenizer, self._limits, most)
        n = request.n or 1
        spec = self._engine.spec
        extra = tuple(request.stop_token_ids or ())
        ends = extra if request.ignore_eos else (*spec.end_token_ids, *extra)
        decoding = decoding_params(request, self._limits)
        unwritten = [spec.mask_token_id, spec.eos_token_id if decoding.logits_eos_inf else None]
        constraints = constraints_of(
            request,
            tokenizer,
            vocab_size=self._limits.vocab_size,
            never_written=frozenset(token for token in unwritten if token is not None),
            end_token_ids=ends,
            max_tokens=max(1, min(canvases.lengths)),
        )
        if spec.renoising is not None and constraints is not None and constraints.bad_words:
            raise RequestError(
                "bad_words is not supported by this model, which writes many tokens at once.",
                param="bad_words",
            )
        if wanted is not None:
            self._formats.check_room(wanted, min(canvases.lengths), length_field(request))
            _check_it_can_be_followed(wanted, decoding, self._limits)
            _check_it_is_free(canvases, request)
        draft, pinned = foreknown(request, tokenizer, self._limits, spec.mask_token_id)
        check_something_is_left(pinned, min(canvases.lengths))
        scorer = None
        if isinstance(request, CompletionRequest):
            scorer = scorer_of(request, self._limits, canvases.prompts, decoding.seed)
        output = _output(request)
        if output.steps and self._limits.traits.renoises:
            raise RequestError(
                "stream_canvas is not supported by this model, whose canvases are written whole.",
                param="stream_canvas",
            )
        if output.steps and any(len(each.candidates) > 1 for each in canvases.infillings):
            raise RequestError(
                "stream_canvas needs one length in infill_lengths: of several, only the best is "
                "told, once all are complete.",
                param="stream_canvas",
            )
        seconds = time_allowed(request, self._limits)
        return Job(
            request_id=clean_id(request.request_id) or new_id(),
            model=request.model or self._name,
            prompts=canvases.prompts,
            lengths=canvases.lengths,
            n=n,
            decoding=replace(decoding, constraints=constraints),
            decoding_report=_report(decoding, canvases, self._limits),
            stops=stop_strings(request),
            end_token_ids=ends,
            extra_end_ids=extra,
            priority=request.priority or 0,
            deadline=None if seconds is None else arrived + seconds,
            grammar=None if wanted is None else wanted.grammar,
            tools=_tools(request, self._limits),
            output=output,
            infillings=canvases.infillings,
            draft=draft,
            pinned=pinned,
            echoes=canvases.echoes,
            scorer=scorer,
            prompt_text=_prompt_text(request, canvases, tokenizer),
        )

    def _format(self, request: ChatCompletionRequest | CompletionRequest) -> AnswerFormat | None:
        """What the request's answers must match."""
        use = _tools(request, self._limits)
        if use is not None and use.forced:
            return forced_calls(use)
        wanted = answer_format(request, self._limits)
        if use is not None and wanted is not None and wanted.field == "response_format":
            return calls_or(use, wanted)
        return wanted


def _tools(
    request: ChatCompletionRequest | CompletionRequest, limits: ServingLimits
) -> ToolUse | None:
    """How the request's answers may call functions."""
    return tool_use(request, limits) if isinstance(request, ChatCompletionRequest) else None


def _prompt_text(
    request: ChatCompletionRequest | CompletionRequest,
    canvases: Canvases,
    tokenizer: PreTrainedTokenizerFast,
) -> str | None:
    """A chat's prompt as the model reads it, when the request wants to see it."""
    if not isinstance(request, ChatCompletionRequest) or not request.return_prompt_text:
        return None
    return tokenizer.decode(
        list(canvases.prompts[0]), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _check_it_can_be_followed(
    wanted: AnswerFormat, decoding: DecodingParams, limits: ServingLimits
) -> None:
    """Refuse decoding that does not go from left to right where an answer must match something.

    Raises:
        RequestError: naming the policy, or the model's way.
    """
    if limits.traits.renoises:
        raise RequestError(
            "This model writes whole canvases, which cannot follow a format that the answer must "
            "match.",
            param=wanted.field,
        )
    if decoding.policy == "p2":
        raise RequestError(
            "policy p2 takes back what it wrote, which cannot follow a format that the answer must "
            "match; name another policy.",
            param="policy",
        )


def _check_it_is_free(
    canvases: Canvases, request: ChatCompletionRequest | CompletionRequest
) -> None:
    """Refuse tokens that are given where an answer must match something.

    Raises:
        RequestError: naming what gives them.
    """
    field = "vllm_xargs" if request.vllm_xargs else None
    if canvases.infillings and isinstance(request, CompletionRequest):
        field = "suffix" if request.suffix else "infill"
    if field is not None:
        raise RequestError(
            f"{field} cannot be given together with a format that the answer must match.",
            param=field,
        )


def _report(decoding: DecodingParams, canvases: Canvases, limits: ServingLimits) -> dict[str, Any]:
    """How the answers are decoded, for the response."""
    if not canvases.infillings:
        return report(decoding, max(canvases.lengths), limits.traits)
    traits = replace(limits.traits, has_auxiliary=False)  # it would not see behind the hole
    told = report(decoding, max(canvases.lengths), traits)
    return told | {"infill_lengths": canvases.infillings[0].lengths}


def _output(request: ChatCompletionRequest | CompletionRequest) -> Output:
    """How the request wants to see its answers; null is the field's default."""
    return Output(
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        return_token_ids=bool(request.return_token_ids),
        return_tokens_as_token_ids=bool(request.return_tokens_as_token_ids),
        min_tokens=request.min_tokens or 0,
        logprobs=wanted_logprobs(request) is not None,
        steps=bool(request.stream and request.stream_canvas),
    )
