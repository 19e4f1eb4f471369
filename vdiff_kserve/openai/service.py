"""Answering requests: to the engine, and back to the client, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from functools import partial
from itertools import chain

from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine import GenerationEngine, GenerationRequest, GenerationStream, Grammars
from vdiff_kserve.observability.requests import RequestRecord, count_refusal
from vdiff_kserve.openai.answers import Answer, Echo, InfillAnswer, Piece
from vdiff_kserve.openai.candidates import BestOf, EventSource, Nothing
from vdiff_kserve.openai.cost import diffusion_info, usage
from vdiff_kserve.openai.errors import (
    RequestError,
    counted_here,
    nesting_refused,
    told_as_request_error,
    unavailable,
)
from vdiff_kserve.openai.fim import FimRequest, FimWriter
from vdiff_kserve.openai.intake import Intake
from vdiff_kserve.openai.job import Job
from vdiff_kserve.openai.likelihood import Scores
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.logprobs import TokenTexts
from vdiff_kserve.openai.protocol import (
    ChatCompletionRequest,
    Chunk,
    CompletionRequest,
    StreamOptions,
)
from vdiff_kserve.openai.response_events import ResponseEvents, ResponseWriter
from vdiff_kserve.openai.response_input import as_chat, in_own_names
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.responses import (
    ChatWriter,
    ChunkEvents,
    CompletionWriter,
    Events,
    FinishedAnswer,
    Writer,
)
from vdiff_kserve.openai.text import AnswerText, Detokenizer
from vdiff_kserve.openai.tokenizer_thread import TokenizerThread
from vdiff_kserve.openai.work import Work

Row = tuple[GenerationRequest, GenerationStream]
"""What the engine was asked, and where it tells what became of it."""


class GenerationService:
    """Answers chat and completion requests with an engine.

    Args:
        grammars: compiles what answers must match; None refuses requests that ask for that.

    Attributes:
        active: requests that are being answered.
        closed: why new requests are refused; None while they are welcome.
        tokenizer_thread: tokenizes long texts.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: PreTrainedTokenizerFast,
        limits: ServingLimits,
        name: str,
        grammars: Grammars | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._name = name
        self.tokenizer_thread = TokenizerThread(tokenizer)
        self._intake = Intake(engine, tokenizer, self.tokenizer_thread, limits, name, grammars)
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
        (work,) = await self.begin([request], endpoint)
        writer = _writer(request, work.job)
        if not request.stream:
            return await _whole(work, writer.response)
        options = request.stream_options or StreamOptions()
        return await _begun(_stream(work, writer, ChunkEvents(), options))

    async def create_response(
        self, request: ResponsesRequest
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Answer a request to the Responses API: the chat that it stands for, told as it wants.

        Raises:
            RequestError: the request cannot be answered.
        """
        with nesting_refused():
            chat = as_chat(request)
        with in_own_names():
            (work,) = await self.begin([chat], "responses")
        writer = ResponseWriter(work.job, request)
        if not request.stream:
            return await _whole(work, writer.response)
        options = StreamOptions(include_usage=True)
        return await _begun(_stream(work, ChatWriter(work.job), ResponseEvents(writer), options))

    async def answer(
        self, requests: Sequence[ChatCompletionRequest | CompletionRequest], endpoint: str
    ) -> list[list[FinishedAnswer]]:
        """The answers to several requests, run together, each with its own parameters.

        Raises:
            RequestError: one of them cannot be answered; none is then.
        """
        works = await self.begin(requests, endpoint)
        with counted_here(), told_as_request_error(), ExitStack() as stack:
            for work in works:
                stack.enter_context(work)
            return await _gather_all(works)

    async def begin(
        self, requests: Sequence[ChatCompletionRequest | CompletionRequest], endpoint: str
    ) -> list[Work]:
        """Check requests and give them to the engine, all or none. Each work must be entered.

        Raises:
            RequestError: one of them is refused.
        """
        arrived = time.perf_counter()
        with self._refusals(endpoint, len(requests)):
            self._refuse_if_closed()
            jobs = [await self._intake.job(request) for request in requests]
            self._refuse_if_closed()
            groups = [job.engine_requests() for job in jobs]
            rows = [row for group in groups for answer in group for row in answer]
            streams = iter(self._engine.submit(rows))
        works = [
            self._work(
                job, [[(row, next(streams)) for row in rows] for rows in group], endpoint, arrived
            )
            for job, group in zip(jobs, groups, strict=True)
        ]
        self.active += len(jobs)
        return works

    def _refuse_if_closed(self) -> None:
        if self.closed is not None:
            raise unavailable(self.closed)

    @contextmanager
    def _refusals(self, endpoint: str, count: int) -> Iterator[None]:
        """Tell what goes wrong inside as a `RequestError`, and count it for so many requests."""
        try:
            with told_as_request_error(), nesting_refused():
                yield
        except RequestError as error:
            count_refusal(self._name, endpoint, error.status, error, count)
            error.counted = True
            raise

    def _work(self, job: Job, rows: Sequence[Sequence[Row]], endpoint: str, arrived: float) -> Work:
        answers = [self._answer(job, i, own) for i, own in enumerate(rows)]
        streams = [stream for own in rows for _, stream in own]
        record = RequestRecord(
            self._name,
            endpoint,
            job.request_id,
            prompt_tokens=job.prompt_tokens,
            answer_prompts=[len(prompt) for prompt in job.prompts for _ in range(job.n)],
            arrived=arrived,
        )
        return Work(job, record, streams, answers, self._one_less)

    def _answer(self, job: Job, index: int, rows: Sequence[Row]) -> Answer:
        generating = [stream for row, stream in rows if row.scoring is None]
        infilling = job.infilling(index)
        source: EventSource = Nothing()
        if infilling is not None:
            source = BestOf(generating, infilling.lengths, infilling.longest)
        elif generating:
            source = generating[0]
        texts = TokenTexts(self._tokenizer, as_ids=job.output.return_tokens_as_token_ids)
        kind: Callable[..., Answer] = Answer
        if infilling is not None and infilling.texts:
            kind = partial(InfillAnswer, infilling.texts, partial(self._text, job))
        return kind(
            index,
            source,
            self._text(job),
            job.extra_end_ids,
            include_stop=job.output.include_stop_str_in_output,
            texts=texts if job.tells_logprobs or job.output.steps else None,
            logprobs=job.tells_logprobs,
            echo=self._echo(job, index, [s for row, s in rows if row.scoring is not None], texts),
        )

    def _text(self, job: Job) -> AnswerText:
        wanted = job.output
        return AnswerText(
            Detokenizer(self._tokenizer, skip_special_tokens=wanted.skip_special_tokens),
            job.stops,
            include_stop=wanted.include_stop_str_in_output,
            min_tokens=wanted.min_tokens,
        )

    def _echo(
        self, job: Job, index: int, scoring: Sequence[EventSource], texts: TokenTexts
    ) -> Echo | None:
        if not job.echoes:
            return None
        prompt = job.prompts[index // job.n]
        scores = Scores(scoring, are_sums=job.scorer is not None and job.scorer.are_sums)
        told = texts if job.scorer is not None else None
        return Echo(job.echoes[index // job.n], prompt, scores, told)

    def _one_less(self) -> None:
        self.active -= 1


def _writer(request: ChatCompletionRequest | CompletionRequest, job: Job) -> Writer:
    if isinstance(request, ChatCompletionRequest):
        return ChatWriter(job)
    return FimWriter(job) if isinstance(request, FimRequest) else CompletionWriter(job)


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


async def _whole(
    work: Work, response: Callable[[Sequence[FinishedAnswer]], BaseModel]
) -> BaseModel:
    with counted_here(), told_as_request_error(), work:
        return response(await _gather(work))


async def _begun(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream that is entered: a generator that never ran would not free its work when closed."""
    await anext(events)
    return events


async def _stream(
    work: Work, writer: Writer, events: Events, options: StreamOptions
) -> AsyncGenerator[str, None]:
    """Server-sent events. The first item is empty: it only begins the generator."""

    def told(chunks: Sequence[Chunk]) -> Iterable[str]:
        return chain.from_iterable(map(events.chunk, chunks))

    with work:
        yield ""
        for event in events.begin():
            yield event
        try:
            with told_as_request_error():
                async with aclosing(work.pieces()) as pieces:
                    async for piece in pieces:
                        for event in told(_chunks(work, writer, piece, options)):
                            yield event
                for event in told(_last_chunks(work, writer, options)):
                    yield event
        except RequestError as error:
            work.record.fail(error.status, error)
            for event in events.error(error):
                yield event
        for event in events.end():
            yield event


def _chunks(work: Work, writer: Writer, piece: Piece, options: StreamOptions) -> Sequence[Chunk]:
    """The chunks of a piece; the last one tells what the answers cost."""
    if piece.view is not None:
        return writer.step(piece.index, piece.view)
    if not piece.text and piece.finish_reason is None:
        return ()
    ends = piece.finish_reason is not None
    is_last = ends and work.num_unfinished == 0 and not options.include_usage
    return writer.chunks(
        piece,
        usage(work.job, work.ends) if options.continuous_usage_stats else None,
        diffusion_info(work.job, work.ends) if is_last else None,
    )


def _last_chunks(work: Work, writer: Writer, options: StreamOptions) -> Sequence[Chunk]:
    """The chunks that tell what the answers cost, for a client that wants it told apart."""
    if not options.include_usage:
        return ()
    return writer.chunks(None, usage(work.job, work.ends), diffusion_info(work.job, work.ends))
