"""One request's answers as they come from the engine, as text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vdiff_kserve.engine import (
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
    GenerationStream,
)
from vdiff_kserve.openai.limits import with_seed_of
from vdiff_kserve.openai.prompts import TokenIds
from vdiff_kserve.openai.protocol import FinishReason
from vdiff_kserve.openai.text import AnswerText
from vdiff_kserve.sampler import DecodingParams


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

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

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
            )
            for prompt, length in zip(self.prompts, self.lengths, strict=True)
            for choice in range(self.n)
        ]


@dataclass(frozen=True)
class Piece:
    """New text of one answer.

    Attributes:
        token_ids: what the text comes from; the first ones may have been held back until now.
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

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.stats.nfe if self.stats.nfe else 0.0


class Answer:
    """One answer: the engine's events in, pieces of text out."""

    def __init__(
        self, index: int, stream: GenerationStream, text: AnswerText, extra_end_ids: Sequence[int]
    ) -> None:
        self._index = index
        self._stream = stream
        self._text = text
        self._extra_end_ids = extra_end_ids

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
        text = self._text.add(event.token_ids)
        if event.finish_reason is not None or self._text.stop_string is not None:
            text += self._text.finish()
        if self._text.stop_string is not None:
            return Piece(
                self._index,
                text,
                self._text.num_tokens,
                event.stats,
                "stop",
                self._text.stop_string,
                event.token_ids,
            )
        stop_id = event.end_token_id if event.end_token_id in self._extra_end_ids else None
        tokens = event.stats.completion_tokens
        return Piece(
            self._index, text, tokens, event.stats, event.finish_reason, stop_id, event.token_ids
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
