"""One request's answers as they come from the engine, as text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vdiff_kserve.engine import (
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
    GenerationStream,
)
from vdiff_kserve.openai.limits import with_seed_of
from vdiff_kserve.openai.logprobs import ScoredToken, TokenTexts
from vdiff_kserve.openai.prompts import TokenIds
from vdiff_kserve.openai.protocol import FinishReason
from vdiff_kserve.openai.text import AnswerText
from vdiff_kserve.openai.tools import ToolUse
from vdiff_kserve.sampler import DecodingParams


@dataclass(frozen=True)
class Output:
    """What a request wants to see of its answers; the fields are the request's.

    Attributes:
        min_tokens: stop strings do not count within so many tokens.
    """

    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    min_tokens: int = 0


@dataclass(frozen=True)
class Job:
    """A request that passed every check.

    Attributes:
        prompts: token ids of each prompt.
        lengths: masked positions after each prompt.
        n: answers per prompt; answer `j` of prompt `i` has the index `i * n + j`.
        decoding: of the first answer; the further ones count its seed up.
        decoding_report: what the response tells about it.
        end_token_ids: tokens that end an answer.
        extra_end_ids: those of them that the request named itself.
        priority: lower goes first.
        deadline: when to give up, on the clock of `time.monotonic`; None never.
        output: how the answers are told.
        grammar: what the answers must match; None is anything.
        tools: how the answers may call functions; None is not at all.
    """

    request_id: str
    model: str
    prompts: Sequence[TokenIds]
    lengths: Sequence[int]
    n: int
    decoding: DecodingParams
    decoding_report: Mapping[str, Any]
    stops: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    extra_end_ids: tuple[int, ...]
    priority: int = 0
    deadline: float | None = None
    output: Output = Output()
    grammar: str | None = None
    tools: ToolUse | None = None

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def tells_logprobs(self) -> bool:
        return self.decoding.top_logprobs is not None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def engine_requests(self) -> list[GenerationRequest]:
        """What the engine has to do, in the order of the answers' indices."""
        return [
            GenerationRequest(
                prompt_ids=prompt,
                max_tokens=length,
                decoding=with_seed_of(self.decoding, choice),
                end_token_ids=self.end_token_ids,
                request_id=self.request_id,
                priority=self.priority,
                deadline=self.deadline,
                grammar=self.grammar,
            )
            for prompt, length in zip(self.prompts, self.lengths, strict=True)
            for choice in range(self.n)
        ]


@dataclass(frozen=True)
class Piece:
    """New text of one answer.

    Attributes:
        token_ids: the tokens of the text, without the end token, up to the one that completed a
            stop string; tokens whose text is held back come with a later piece.
        end_token_id: on the last piece, the token that ended the answer.
        logprobs: one for each token, the end token included, when the request asks for them.
        completion_tokens: tokens of the answer so far, its end token included.
        finish_reason: on the last piece, why the answer ended.
        stop_reason: on the last piece, the stop string or the requested token that ended it.
    """

    index: int
    text: str
    completion_tokens: int
    stats: GenerationStats
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] = ()
    end_token_id: int | None = None
    logprobs: tuple[ScoredToken, ...] = ()

    @property
    def counted_token_ids(self) -> tuple[int, ...]:
        """The tokens that the usage counts."""
        return self.token_ids if self.end_token_id is None else (*self.token_ids, self.end_token_id)

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.stats.nfe if self.stats.nfe else 0.0


class Answer:
    """One answer: the engine's events in, pieces of text out.

    Args:
        extra_end_ids: end tokens that the request named itself.
        include_stop: whether the text ends with the end token's, as far as that has one.
        texts: what log probabilities are told with; None tells none.
    """

    def __init__(
        self,
        index: int,
        stream: GenerationStream,
        text: AnswerText,
        extra_end_ids: Sequence[int],
        *,
        include_stop: bool = False,
        texts: TokenTexts | None = None,
    ) -> None:
        self._index = index
        self._stream = stream
        self._text = text
        self._extra_end_ids = extra_end_ids
        self._include_stop = include_stop
        self._texts = texts
        self._read = 0
        self._waiting: list[GenerationEvent] = []

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's pieces; one without text when only its cost grew.

        Raises:
            EngineError: the engine could not finish it.
        """
        async for event in self._stream:
            piece = self._piece(event)
            yield piece
            if piece.finish_reason is not None:
                self._stream.abort()
                return

    def _piece(self, event: GenerationEvent) -> Piece:
        """The text that an event makes ready, with the tokens that waited for it."""
        shown = event.token_ids
        if self._include_stop and event.end_token_id is not None:
            shown = (*shown, event.end_token_id)
        text = self._text.add(shown)
        if event.finish_reason is not None or self._text.stop_string is not None:
            text += self._text.finish()
        finish_reason, tokens = event.finish_reason, event.stats.completion_tokens
        stop: str | int | None = None
        if self._text.stop_string is not None:
            stop, finish_reason = self._text.stop_string, "stop"
            tokens = self._text.num_tokens
            event = _cut(event, tokens - self._read)
        elif event.end_token_id in self._extra_end_ids:
            stop = event.end_token_id
        self._read += len(event.token_ids)
        self._waiting.append(event)
        piece = Piece(self._index, text, tokens, event.stats, finish_reason, stop)
        return self._with_tokens(piece) if text or finish_reason is not None else piece

    def _with_tokens(self, piece: Piece) -> Piece:
        events, self._waiting = self._waiting, []
        texts = self._texts
        return replace(
            piece,
            token_ids=tuple(token for event in events for token in event.token_ids),
            end_token_id=events[-1].end_token_id,
            logprobs=tuple(texts.scored(told) for event in events for told in event.logprobs)
            if texts
            else (),
        )


def _cut(event: GenerationEvent, count: int) -> GenerationEvent:
    """The event's first `count` tokens, of which the last may be its end token."""
    keeps_end = count > len(event.token_ids)
    return replace(
        event,
        token_ids=event.token_ids[:count],
        end_token_id=event.end_token_id if keeps_end else None,
        logprobs=event.logprobs[:count],
    )


async def interleave(answers: Sequence[Answer]) -> AsyncGenerator[Piece, None]:
    """The pieces of several answers in the order of their arrival.

    Raises:
        EngineError: one of them failed; the others are not waited for.
    """
    arrived: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()

    async def forward(answer: Answer) -> None:
        async for piece in answer.pieces():
            arrived.put_nowait(piece)

    tasks = [asyncio.create_task(forward(answer)) for answer in answers]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Piece):
                yield item
            else:
                item.result()
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
