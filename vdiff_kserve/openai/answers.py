"""One request's answers as they come from the engine, as text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vdiff_kserve.engine import GenerationEvent, GenerationStats, StepView
from vdiff_kserve.openai.candidates import EventSource
from vdiff_kserve.openai.likelihood import Scores
from vdiff_kserve.openai.logprobs import ScoredToken, TokenTexts
from vdiff_kserve.openai.prompts import TokenIds
from vdiff_kserve.openai.protocol import FinishReason, StepInfo
from vdiff_kserve.openai.text import AnswerText


@dataclass(slots=True)
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
        holes: on the last piece, the texts of the holes of a prompt that has some marked.
        view: what a denoising step wrote; such a piece has nothing else.
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
    holes: tuple[str, ...] | None = None
    view: StepInfo | None = None

    @property
    def counted_token_ids(self) -> tuple[int, ...]:
        """The tokens that the usage counts."""
        return self.token_ids if self.end_token_id is None else (*self.token_ids, self.end_token_id)

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.stats.nfe if self.stats.nfe else 0.0


@dataclass(frozen=True)
class Echo:
    """What goes before an answer that echoes its prompt.

    Attributes:
        prompt: the prompt's tokens.
        scores: of them; those at the beginning have none.
        texts: what log probabilities are told with; None tells none.
    """

    text: str
    prompt: TokenIds
    scores: Scores
    texts: TokenTexts | None

    async def scored(self) -> tuple[ScoredToken, ...]:
        """The prompt's tokens with their log probabilities, when they are wanted.

        Raises:
            EngineError: the engine could not score them.
        """
        told = await self.scores.gather()
        if self.texts is None:
            return ()
        unscored = self.prompt[: len(self.prompt) - len(told)]
        return (
            *(self.texts.unscored(token) for token in unscored),
            *(self.texts.scored(each) for each in told),
        )


class Answer:
    """One answer: the engine's events in, pieces of text out.

    Args:
        extra_end_ids: end tokens that the request named itself.
        include_stop: whether the text ends with the end token's, as far as that has one.
        texts: what log probabilities and steps are told with; None tells none.
        logprobs: whether to tell log probabilities.
        echo: what goes before the answer; None is nothing.
    """

    def __init__(
        self,
        index: int,
        stream: EventSource,
        text: AnswerText,
        extra_end_ids: Sequence[int],
        *,
        include_stop: bool = False,
        texts: TokenTexts | None = None,
        logprobs: bool = True,
        echo: Echo | None = None,
    ) -> None:
        self._echo = echo
        self._tells_logprobs = texts is not None and logprobs
        self._index = index
        self._stream = stream
        self._text = text
        self._extra_end_ids = extra_end_ids
        self._include_stop = include_stop
        self._texts = texts
        self._read = 0
        self._spent: GenerationStats | None = None
        self._waiting: tuple[int, ...] = ()
        self._waiting_logprobs: tuple[ScoredToken, ...] = ()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's pieces; one without text when only its cost grew.

        Raises:
            EngineError: the engine could not finish it.
        """
        if self._echo is not None:
            logprobs = await self._echo.scored()
            self._spent = self._echo.scores.stats
            yield Piece(self._index, self._echo.text, 0, self._spent, logprobs=logprobs)
        async for event in self._stream:
            if event.view is not None:
                view = self._step(event.view)
                yield Piece(self._index, "", self._read, event.stats, view=view)
                continue
            piece = self._piece(event)
            yield piece
            if piece.finish_reason is not None:
                self._stream.abort()
                return

    def _step(self, view: StepView) -> StepInfo:
        assert self._texts is not None
        return StepInfo(
            step=view.step,
            positions=list(view.positions),
            text=[self._texts.text(token) for token in view.token_ids],
            confidence=list(view.confidence),
            masks=view.masks,
            masked_again=list(view.masked_again),
        )

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
        return self._made(event, text, tokens, finish_reason, stop)

    def _made(
        self,
        event: GenerationEvent,
        text: str,
        completion_tokens: int,
        finish_reason: FinishReason | None,
        stop_reason: str | int | None = None,
        holes: tuple[str, ...] | None = None,
    ) -> Piece:
        """The piece of an event, with the tokens that waited for its text."""
        self._read += len(event.token_ids)
        self._waiting += event.token_ids
        if self._texts is not None and self._tells_logprobs:
            self._waiting_logprobs += tuple(map(self._texts.scored, event.logprobs))
        stats = event.stats if self._spent is None else event.stats.plus(self._spent)
        if not text and finish_reason is None:
            return Piece(self._index, text, completion_tokens, stats)
        token_ids, self._waiting = self._waiting, ()
        logprobs, self._waiting_logprobs = self._waiting_logprobs, ()
        return Piece(
            self._index,
            text,
            completion_tokens,
            stats,
            finish_reason,
            stop_reason,
            token_ids,
            event.end_token_id,
            logprobs,
            holes,
        )


class InfillAnswer(Answer):
    """A text with holes, as they are filled.

    Args:
        between: the text before each hole, and behind the last.
        text_of_hole: makes the text of a hole.
    """

    def __init__(
        self,
        between: Sequence[str],
        text_of_hole: Callable[[], AnswerText],
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._between = between
        self._text_of_hole = text_of_hole
        self._holes: list[str] = []

    def _piece(self, event: GenerationEvent) -> Piece:
        """The text that an event makes ready, with the given text before it."""
        text = ""
        while len(self._holes) <= event.hole:
            text += self._end_hole() + self._between[len(self._holes)]
            self._holes.append("")
            self._text = self._text_of_hole()
        if self._text.stop_string is None:
            text += self._fill(self._text.add(event.token_ids))
        holes = None
        if event.finish_reason is not None:
            while len(self._holes) < len(self._between) - 1:
                text += self._end_hole() + self._between[len(self._holes)]
                self._holes.append("")
            text += self._end_hole() + self._between[-1]
            holes = tuple(self._holes)
        tokens = event.stats.completion_tokens
        return self._made(event, text, tokens, event.finish_reason, holes=holes)

    def _end_hole(self) -> str:
        """What was held back of the hole's text."""
        return self._fill(self._text.finish()) if self._holes else ""

    def _fill(self, text: str) -> str:
        self._holes[-1] += text
        return text


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
