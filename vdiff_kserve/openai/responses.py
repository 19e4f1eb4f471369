"""From pieces of text to responses and chunks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from pydantic import BaseModel, TypeAdapter

from vdiff_kserve import __version__
from vdiff_kserve.openai.answers import Piece
from vdiff_kserve.openai.cost import diffusion_info, usage
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.job import Job
from vdiff_kserve.openai.logprobs import ScoredToken, chat_logprobs, completion_logprobs
from vdiff_kserve.openai.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Chunk,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    DiffusionInfo,
    ErrorResponse,
    FinishReason,
    StepInfo,
    Usage,
)
from vdiff_kserve.openai.tool_answers import AnswerDeltas, finish_reason_of, message_of

FINGERPRINT = f"vdiff-{__version__}"


class FinishedAnswer:
    """A whole answer, gathered from its pieces.

    Attributes:
        token_ids: the tokens that the usage counts.
        logprobs: of each of them, when the request asks for them.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[ScoredToken] = []
        self.last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self._texts.append(piece.text)
        self.token_ids += piece.counted_token_ids
        self.logprobs += piece.logprobs
        self.last = piece

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def end(self) -> Piece:
        """The last piece, with the finish reason and the cost."""
        if self.last is None:
            raise ValueError("the answer has no piece yet")
        return self.last

    @property
    def finish_reason(self) -> FinishReason:
        if self.end.finish_reason is None:
            raise ValueError("the answer is not finished")
        return self.end.finish_reason


class Writer(Protocol):
    """How one endpoint writes what it answers."""

    def response(self, answers: Sequence[FinishedAnswer]) -> BaseModel:
        """The whole response."""
        ...

    def chunks(
        self, piece: Piece | None, usage: Usage | None, info: DiffusionInfo | None
    ) -> Sequence[Chunk]:
        """The chunks of a stream that a piece comes to; without one they carry usage only."""
        ...

    def step(self, index: int, view: StepInfo) -> Sequence[Chunk]:
        """A chunk without text that tells what a denoising step of an answer wrote, and what has to
        come before it."""
        ...


class Events(Protocol):
    """How one endpoint tells the chunks of a stream as server-sent events."""

    def begin(self) -> Iterable[str]:
        """What comes before the first chunk."""
        ...

    def chunk(self, chunk: Any) -> Iterable[str]:
        """One chunk of the endpoint's writer."""
        ...

    def error(self, error: RequestError) -> Iterable[str]:
        """What went wrong after the stream had begun."""
        ...

    def end(self) -> Iterable[str]:
        """What comes last."""
        ...


JSON = TypeAdapter[Any](Any)
"""Writes dictionaries as their values' models are written."""
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Characters that JSON may hold, and at which some clients (httpx) end a line of a stream."""


def in_one_line(data: str) -> str:
    """JSON in the form that every client of a stream reads as one line."""
    return data if data.isascii() else data.translate(LINE_ENDS)


class ChunkEvents:
    """The events of chats and completions: the chunks themselves, then `[DONE]`."""

    def begin(self) -> Iterable[str]:
        """Nothing: the role comes with the first text."""
        return ()

    def chunk(self, chunk: Chunk | ErrorResponse) -> Iterable[str]:
        """The chunk."""
        data = JSON.dump_json(chunk).decode()
        return (f"data: {in_one_line(data)}\n\n",)

    def error(self, error: RequestError) -> Iterable[str]:
        """The error's body."""
        return self.chunk(error.response)

    def end(self) -> Iterable[str]:
        """OpenAI's last line."""
        return ("data: [DONE]\n\n",)


def _head(prefix: str, job: Job) -> Chunk:
    """What every object of a response begins with."""
    return {
        "id": f"{prefix}-{job.request_id}",
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }


def _prompt_ids(job: Job, index: int) -> list[int] | None:
    """The prompt of answer number `index`, for a request that wants to see tokens."""
    return list(job.prompts[index // job.n]) if job.output.return_token_ids else None


def _holes(piece: Piece) -> list[str] | None:
    return None if piece.holes is None else list(piece.holes)


class ChatWriter:
    """Writes `chat.completion` objects."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._head = _head("chatcmpl", job)
        self._deltas = [AnswerDeltas(job.tools) for _ in range(job.num_answers)]
        self._is_open = job.num_answers == 1
        self._tells_prompt = job.tells_prompt

    def response(self, answers: Sequence[FinishedAnswer]) -> ChatCompletion:
        """The whole response."""
        ends = [answer.end for answer in answers]
        return ChatCompletion(
            **self._head,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=usage(self._job, ends),
            vdiff=diffusion_info(self._job, ends),
            prompt_token_ids=_prompt_ids(self._job, 0),
            prompt_text=self._job.prompt_text,
        )

    def _choice(self, index: int, answer: FinishedAnswer) -> ChatChoice:
        message = message_of(answer.text, self._job.tools)
        reason = finish_reason_of(answer.finish_reason, has_calls=bool(message.tool_calls))
        assert reason is not None
        return ChatChoice(
            index=index,
            message=message,
            logprobs=chat_logprobs(answer.logprobs) if self._job.tells_logprobs else None,
            finish_reason=reason,
            stop_reason=answer.end.stop_reason,
            token_ids=answer.token_ids if self._job.output.return_token_ids else None,
        )

    def chunks(
        self, piece: Piece | None, usage: Usage | None, info: DiffusionInfo | None
    ) -> list[ChatCompletionChunk]:
        """A chunk for each delta; the first of an answer carries the role beside its text."""
        if piece is None:
            return [self._chunk([], usage, info)]
        answer, choices = self._deltas[piece.index], self._opening()
        is_last = piece.finish_reason is not None
        deltas = answer.of(piece.text, is_last=is_last)
        tells_tokens = self._job.tells_logprobs or self._job.output.return_token_ids
        if not deltas and (is_last or tells_tokens or self._tells_prompt):
            deltas = [{}]
        if deltas:
            choices += [_choice(piece.index, delta) for delta in deltas]
            self._tell(choices[-1], piece, has_calls=answer.has_calls)
        chunks = [
            self._chunk([choice], usage, info if choice is choices[-1] else None)
            for choice in choices
        ]
        if chunks and self._tells_prompt:
            self._tells_prompt = False
            if self._job.output.return_token_ids:
                chunks[0]["prompt_token_ids"] = list(self._job.prompts[0])
            if self._job.prompt_text is not None:
                chunks[0]["prompt_text"] = self._job.prompt_text
        return chunks

    def _opening(self) -> list[ChatChunkChoice]:
        """What comes first: several answers get a role each, in their order, before one of them has
        text, since OpenAI's library takes any choice that it does not know for the next one."""
        if self._is_open:
            return []
        self._is_open = True
        return [_choice(index, answer.open()) for index, answer in enumerate(self._deltas)]

    def _tell(self, choice: ChatChunkChoice, piece: Piece, *, has_calls: bool) -> None:
        """Add to a piece's last delta what belongs to the piece as a whole."""
        if self._job.tells_logprobs:
            choice["logprobs"] = chat_logprobs(piece.logprobs)
        choice["finish_reason"] = finish_reason_of(piece.finish_reason, has_calls=has_calls)
        choice["stop_reason"] = piece.stop_reason
        if self._job.output.return_token_ids:
            choice["token_ids"] = list(piece.counted_token_ids)

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | None = None,
        info: DiffusionInfo | StepInfo | None = None,
    ) -> ChatCompletionChunk:
        begun = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return _with_cost(cast("ChatCompletionChunk", begun), usage, info)

    def step(self, index: int, view: StepInfo) -> list[ChatCompletionChunk]:
        """A chunk without text, behind those that begin several answers."""
        opening = [self._chunk([choice]) for choice in self._opening()]
        return [*opening, self._chunk([_choice(index, {})], None, view)]


AnyChunk = TypeVar("AnyChunk", ChatCompletionChunk, CompletionChunk)


def _with_cost(
    chunk: AnyChunk, usage: Usage | None, info: DiffusionInfo | StepInfo | None
) -> AnyChunk:
    """A chunk with what it has to tell beside its choices."""
    if usage is not None:
        chunk["usage"] = usage
    if info is not None:
        chunk["vdiff"] = info
    return chunk


def _choice(index: int, delta: ChatDelta) -> ChatChunkChoice:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


class CompletionWriter:
    """Writes `text_completion` objects."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._head = _head("cmpl", job)
        self._offsets: dict[int, int] = {}

    def response(self, answers: Sequence[FinishedAnswer]) -> Completion:
        """The whole response."""
        ends = [answer.end for answer in answers]
        return Completion(
            **self._head,
            choices=[
                CompletionChoice(
                    index=index,
                    text=answer.text,
                    logprobs=self._logprobs(answer.logprobs),
                    finish_reason=answer.finish_reason,
                    stop_reason=answer.end.stop_reason,
                    token_ids=answer.token_ids if self._job.output.return_token_ids else None,
                    prompt_token_ids=_prompt_ids(self._job, index),
                    holes=_holes(answer.end),
                )
                for index, answer in enumerate(answers)
            ],
            usage=usage(self._job, ends),
            vdiff=diffusion_info(self._job, ends),
        )

    def chunks(
        self, piece: Piece | None, usage: Usage | None, info: DiffusionInfo | None
    ) -> list[CompletionChunk]:
        """One chunk of a stream."""
        choices = [] if piece is None else [self._choice(piece)]
        return [self._chunk(choices, usage, info)]

    def _choice(self, piece: Piece) -> CompletionChunkChoice:
        is_first = piece.index not in self._offsets
        offset = self._offsets.setdefault(piece.index, 0)
        self._offsets[piece.index] += sum(len(each.text) for each in piece.logprobs)
        choice = cast("CompletionChunkChoice", {"index": piece.index, "text": piece.text})
        if piece.holes is not None:
            choice["holes"] = list(piece.holes)
        choice["logprobs"] = self._logprobs(piece.logprobs, offset)
        choice["finish_reason"] = piece.finish_reason
        choice["stop_reason"] = piece.stop_reason
        wanted = self._job.output.return_token_ids
        if wanted:
            choice["token_ids"] = list(piece.counted_token_ids)
        # As vLLM, a stream that echoes its prompt begins with the prompt's tokens.
        if is_first and (wanted or self._job.echoes):
            choice["prompt_token_ids"] = list(self._job.prompts[piece.index // self._job.n])
        return choice

    def _chunk(
        self,
        choices: list[CompletionChunkChoice],
        usage: Usage | None,
        info: DiffusionInfo | StepInfo | None,
    ) -> CompletionChunk:
        begun = {**self._head, "object": "text_completion", "choices": choices}
        return _with_cost(cast("CompletionChunk", begun), usage, info)

    def step(self, index: int, view: StepInfo) -> list[CompletionChunk]:
        """A chunk without text."""
        choice: CompletionChunkChoice = {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        return [self._chunk([choice], None, view)]

    def _logprobs(
        self, tokens: Sequence[ScoredToken], offset: int = 0
    ) -> CompletionLogprobs | None:
        return completion_logprobs(tokens, offset) if self._job.tells_logprobs else None
