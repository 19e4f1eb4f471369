"""One accepted request: its rows in the engine, what they cost, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from http import HTTPStatus
from types import TracebackType
from typing import Self

from vdiff_kserve.engine import EngineError, GenerationStream
from vdiff_kserve.observability.requests import RequestRecord
from vdiff_kserve.openai.answers import Answer, Piece, interleave
from vdiff_kserve.openai.errors import RequestError, from_engine
from vdiff_kserve.openai.job import Job


class Work:
    """A job that the engine has taken. Leaving it frees whatever is unfinished.

    Attributes:
        record: what the metrics and the log will say.
        latest: the latest piece of each answer that has one, by index.
    """

    def __init__(
        self,
        job: Job,
        record: RequestRecord,
        streams: Sequence[GenerationStream],
        answers: Sequence[Answer],
        on_end: Callable[[], None],
    ) -> None:
        self.job = job
        self.record = record
        self.latest: dict[int, Piece] = {}
        self._streams = streams
        self._answers = answers
        self._on_end = on_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in self._streams:
            stream.abort()
        if error is not None and not _client_left(error):
            self.record.fail(_code(error), error)
        self.record.close()
        self._on_end()

    @property
    def num_unfinished(self) -> int:
        """Answers that have not ended."""
        finished = sum(piece.finish_reason is not None for piece in self.latest.values())
        return self.job.num_answers - finished

    @property
    def ends(self) -> list[Piece]:
        """The latest pieces in the order of their indices."""
        return [self.latest[index] for index in sorted(self.latest)]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answers' pieces as they arrive; one without text when only its cost grew.

        Raises:
            EngineError: the engine could not finish an answer.
        """
        source = self._answers[0].pieces() if len(self._answers) == 1 else interleave(self._answers)
        async with aclosing(source) as pieces:
            async for piece in pieces:
                self._account(piece)
                yield piece

    def _account(self, piece: Piece) -> None:
        self.latest[piece.index] = piece
        self.record.heard(
            piece.index,
            piece.stats,
            piece.completion_tokens,
            has_text=bool(piece.text),
            finish_reason=piece.finish_reason,
        )


def _client_left(error: BaseException) -> bool:
    return isinstance(error, asyncio.CancelledError | GeneratorExit)


def _code(error: BaseException) -> int:
    if isinstance(error, EngineError):
        return from_engine(error).status
    if isinstance(error, RequestError):
        return error.status
    return HTTPStatus.INTERNAL_SERVER_ERROR
