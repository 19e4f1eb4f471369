"""Answering requests: checks, prompts, the engine, and the way back to the client."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from itertools import islice

from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine import Engine, GenerationStream
from vdiff_kserve.observability.requests import RequestRecord, count_refusal
from vdiff_kserve.openai.answers import Answer, Job
from vdiff_kserve.openai.decoding import report
from vdiff_kserve.openai.errors import (
    RequestError,
    told_as_request_error,
    unavailable,
)
from vdiff_kserve.openai.limits import (
    ServingLimits,
    answer_length,
    check,
    decoding_params,
    stop_strings,
    time_allowed,
)
from vdiff_kserve.openai.prompts import chat_prompt, completion_prompts
from vdiff_kserve.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    StreamOptions,
)
from vdiff_kserve.openai.responses import (
    ChatWriter,
    CompletionWriter,
    FinishedAnswer,
    Writer,
    diffusion_info,
    usage,
)
from vdiff_kserve.openai.text import AnswerText, Detokenizer
from vdiff_kserve.openai.work import Work

DONE = "data: [DONE]\n\n"
MAX_REQUEST_ID_LENGTH = 64


class GenerationService:
    """Answers chat and completion requests with one engine.

    Attributes:
        active: requests that are being answered.
        closed: why new requests are refused; None while they are welcome.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits, name: str
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._name = name
        self.limits = limits
        self.active = 0
        self.closed: str | None = None

    async def respond(
        self, request: ChatCompletionRequest | CompletionRequest
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Answer a request as its endpoint does: with a stream of chunks when it asks for one.

        Raises:
            RequestError: the request cannot be answered.
        """
        endpoint = "chat" if isinstance(request, ChatCompletionRequest) else "completion"
        (work,) = self.submit([request], endpoint)
        writer: Writer = (ChatWriter if endpoint == "chat" else CompletionWriter)(work.job)
        if not request.stream:
            with told_as_request_error(), work:
                return writer.response(await _gather(work))
        events = _stream(work, writer, request.stream_options or StreamOptions())
        # Begun here: a generator that never ran would not free its work when it is closed.
        await anext(events)
        return events

    async def answer(
        self, requests: Sequence[ChatCompletionRequest | CompletionRequest], endpoint: str
    ) -> list[list[FinishedAnswer]]:
        """The answers to several requests, run together, each with its own parameters.

        Raises:
            RequestError: one of them cannot be answered; none is then.
        """
        works = self.submit(requests, endpoint)
        with told_as_request_error(), ExitStack() as stack:
            for work in works:
                stack.enter_context(work)
            return await _gather_all(works)

    def submit(
        self, requests: Sequence[ChatCompletionRequest | CompletionRequest], endpoint: str
    ) -> list[Work]:
        """Check requests and give them to the engine, all or none. Each work must be entered.

        Raises:
            RequestError: one of them is refused.
        """
        arrived = time.perf_counter()
        try:
            with told_as_request_error():
                if self.closed is not None:
                    raise unavailable(self.closed)
                jobs = [self._job(request) for request in requests]
                streams = iter(self._engine.submit([r for j in jobs for r in j.engine_requests()]))
        except RequestError as error:
            count_refusal(self._name, endpoint, error.status, error, len(requests))
            raise
        self.active += len(jobs)
        return [
            self._work(job, list(islice(streams, job.num_answers)), endpoint, arrived)
            for job in jobs
        ]

    def _work(
        self, job: Job, streams: list[GenerationStream], endpoint: str, arrived: float
    ) -> Work:
        answers = [
            Answer(
                i,
                stream,
                AnswerText(Detokenizer(self._tokenizer), job.stops),
                job.extra_end_ids,
            )
            for i, stream in enumerate(streams)
        ]
        record = RequestRecord(
            self._name,
            endpoint,
            job.request_id,
            prompt_tokens=job.prompt_tokens,
            answer_prompts=[len(prompt) for prompt in job.prompts for _ in range(job.n)],
            arrived=arrived,
        )
        return Work(job, record, streams, answers, self._one_less)

    def _one_less(self) -> None:
        self.active -= 1

    def _job(self, request: ChatCompletionRequest | CompletionRequest) -> Job:
        check(request, self.limits)
        if isinstance(request, ChatCompletionRequest):
            prompts = [chat_prompt(request, self._tokenizer)]
        else:
            prompts = completion_prompts(request, self._tokenizer, self.limits)
        n = request.n or 1
        most = self.limits.max_choices
        if n * len(prompts) > most:
            raise RequestError(
                f"n times the number of prompts must be at most {most}, got {n * len(prompts)}.",
                param="prompt",
            )
        own = self._engine.spec.end_token_ids
        extra = tuple(request.stop_token_ids or ())
        lengths = [answer_length(request, len(prompt), self.limits) for prompt in prompts]
        decoding = decoding_params(request, self.limits)
        seconds = time_allowed(request, self.limits)
        return Job(
            request_id=(request.request_id or uuid.uuid4().hex)[:MAX_REQUEST_ID_LENGTH],
            model=request.model or self._name,
            prompts=prompts,
            lengths=lengths,
            n=n,
            decoding=decoding,
            decoding_report=report(decoding, max(lengths), self.limits.traits),
            stops=stop_strings(request),
            end_token_ids=extra if request.ignore_eos else (*own, *extra),
            extra_end_ids=extra,
            priority=request.priority or 0,
            deadline=None if seconds is None else time.monotonic() + seconds,
        )


async def _gather(work: Work) -> list[FinishedAnswer]:
    answers = [FinishedAnswer() for _ in range(work.job.num_answers)]
    async with aclosing(work.pieces()) as pieces:
        async for piece in pieces:
            answers[piece.index].add(piece)
    return answers


async def _gather_all(works: Sequence[Work]) -> list[list[FinishedAnswer]]:
    """Gather several at once, so that each is heard, and its times taken, as it comes."""
    tasks = [asyncio.create_task(_gather(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _stream(work: Work, writer: Writer, options: StreamOptions) -> AsyncGenerator[str, None]:
    """Server-sent events. The first item is empty: it only begins the generator."""
    with work:
        yield ""
        try:
            with told_as_request_error():
                async with aclosing(_chunks(work, writer, options)) as chunks:
                    async for chunk in chunks:
                        yield f"data: {chunk.model_dump_json()}\n\n"
        except RequestError as error:
            work.record.fail(error.status, error)
            yield f"data: {error.response.model_dump_json()}\n\n"
        yield DONE


async def _chunks(
    work: Work, writer: Writer, options: StreamOptions
) -> AsyncGenerator[BaseModel, None]:
    """The chunks of a stream; the last tells what the answers cost."""
    async with aclosing(work.pieces()) as pieces:
        async for piece in pieces:
            if not piece.text and piece.finish_reason is None:
                continue
            is_last = work.num_unfinished == 0 and not options.include_usage
            yield writer.chunk(
                piece,
                usage(work.job, work.ends) if options.continuous_usage_stats else None,
                diffusion_info(work.job, work.ends) if is_last else None,
            )
    if options.include_usage:
        yield writer.chunk(None, usage(work.job, work.ends), diffusion_info(work.job, work.ends))
