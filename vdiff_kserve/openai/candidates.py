"""Several rows that end in one answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol

from vdiff_kserve.engine import GenerationEvent, GenerationStats, TokenLogprob


class EventSource(Protocol):
    """An answer's events."""

    def abort(self) -> None:
        """Nobody wants them any more."""
        ...

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """The events in order."""
        ...


class Nothing:
    """An answer of no tokens."""

    def abort(self) -> None:
        """There is nothing to abort."""

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """Its end."""
        yield GenerationEvent((), GenerationStats(0, 0, 0, 0, 0, 0), "length")


class BestOf:
    """A hole in several lengths, of which the best is the answer; one length is sent as it comes.

    Args:
        streams: one for each length.
        lengths: masks of the hole in each.
        longest: masks that it may have. A shorter hole that is full was not cut off by it.
    """

    def __init__(
        self, streams: Sequence[EventSource], lengths: Sequence[int], longest: int
    ) -> None:
        self._streams = streams
        self._lengths = lengths
        self._longest = longest

    def abort(self) -> None:
        """Stop all of them."""
        for stream in self._streams:
            stream.abort()

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """The events of the best, as one when there are several.

        Raises:
            EngineError: a row failed.
        """
        if len(self._streams) == 1:
            async for event in self._streams[0]:
                yield self._ended(event, self._lengths[0])
            return
        wholes = [await _whole(stream) for stream in self._streams]
        scores = [-float("inf") if each.score is None else each.score for each in wholes]
        best = max(range(len(wholes)), key=scores.__getitem__)
        stats = wholes[best].stats
        for each in (*wholes[:best], *wholes[best + 1 :]):
            stats = stats.plus(each.stats)
        yield replace(self._ended(wholes[best], self._lengths[best]), stats=stats)

    def _ended(self, event: GenerationEvent, length: int) -> GenerationEvent:
        is_short = event.finish_reason == "length" and length < self._longest
        return replace(event, finish_reason="stop") if is_short else event


async def _whole(events: EventSource) -> GenerationEvent:
    """All events of an answer as one."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    end_token_id = None
    async for event in events:
        tokens, logprobs = tokens + event.token_ids, logprobs + event.logprobs
        end_token_id = event.end_token_id if end_token_id is None else end_token_id
        last = event
    return replace(last, token_ids=tokens, logprobs=logprobs, end_token_id=end_token_id)
