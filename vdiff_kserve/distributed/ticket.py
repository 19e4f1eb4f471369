"""One accepted request: what its client has of it, and how it goes on after a replica is lost."""

from __future__ import annotations

import time
from asyncio import TimerHandle
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vdiff_kserve.distributed.messages import Submit
from vdiff_kserve.engine import EngineError, GenerationEvent, GenerationRequest, GenerationStream

MAX_LOSSES = 4
"""A request that was on so many replicas when they were lost is given up."""
LOSSES_TO_ISOLATE = 2
"""After so many it runs alone: nothing else is lost with it, and a further loss is its own."""


class DivergedError(EngineError):
    """A request that ran again and answered otherwise."""


class Part(NamedTuple):
    """A token of an answer, and the hole that it fills or ends."""

    hole: int
    token: int


@dataclass(eq=False)
class Ticket:
    """A request between its admission and its end.

    Attributes:
        work: forward-pass tokens that it will cost, estimated.
        prefixes: hashes of the prompt's beginnings, shortest first; empty when nobody caches them.
        delivered: what its stream has.
        losses: replicas that were lost with it.
        timer: ends its wait at its deadline.
    """

    key: int
    request: GenerationRequest
    stream: GenerationStream
    work: int
    prefixes: tuple[bytes, ...] = ()
    delivered: list[Part] = field(default_factory=list)
    losses: int = 0
    done: bool = False
    timer: TimerHandle | None = None
    _seen: int = 0
    _steps_viewed: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Order among waiting requests: priority, then arrival."""
        return self.request.priority, self.key

    @property
    def must_run_alone(self) -> bool:
        return self.losses >= LOSSES_TO_ISOLATE

    @property
    def tokens_left(self) -> int:
        """Tokens of the answer that are not delivered yet."""
        return max(0, self.request.max_tokens - len(self.delivered))

    @property
    def work_left(self) -> float:
        """Forward-pass tokens that the rest of it will cost, estimated."""
        if self.request.max_tokens == 0:  # it scores
            return self.work
        return self.work * self.tokens_left / self.request.max_tokens

    @property
    def seconds_left(self) -> float | None:
        """Until its deadline; None is for ever."""
        deadline = self.request.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def begin(self) -> Submit:
        """What a replica is told; it runs the request from its beginning."""
        self._seen = 0
        return Submit(self.key, replace(self.request, deadline=None), self.seconds_left)

    def put(self, event: GenerationEvent | EngineError) -> None:
        """Pass an event on, on the stream's loop, without what an earlier run delivered.

        A request that differs from its earlier run, which equal seeds rule out but rounding may
        not, fails: its client has text that does not go with the rest.
        """
        if self.done:
            return
        if isinstance(event, GenerationEvent):
            try:
                fresh = self._fresh(event)
            except DivergedError as error:
                self.fail(error)
                return
            if fresh is None:
                return
            event = fresh
        if isinstance(event, EngineError) or event.finish_reason is not None:
            self.close()
        self.stream.put_now(event)

    def fail(self, error: EngineError) -> None:
        """End it with an error; from any thread."""
        if not self.done:
            self.close()
            self.stream.put(error)

    def close(self) -> None:
        """Nothing more is delivered."""
        self.done = True
        if self.timer is not None:
            self.timer.cancel()

    def _fresh(self, event: GenerationEvent) -> GenerationEvent | None:
        """The part of an event that is new; None when there is none.

        Raises:
            DivergedError: the rest is not what was delivered.
        """
        if event.view is not None:
            is_new = event.view.step > self._steps_viewed
            self._steps_viewed = max(self._steps_viewed, event.view.step)
            return event if is_new else None
        parts, seen, had = _parts(event), self._seen, len(self.delivered)
        known = min(len(parts), had - seen)
        self._seen += len(parts)
        if parts[:known] != self.delivered[seen : seen + known] or (
            event.finish_reason is not None and self._seen < had
        ):
            raise DivergedError("The answer came out differently when it was run again.")
        self.delivered += parts[known:]
        if known == 0:
            return event
        if known == len(parts) and event.finish_reason is None:
            return None
        return replace(event, token_ids=event.token_ids[known:], logprobs=event.logprobs[known:])


def _parts(event: GenerationEvent) -> list[Part]:
    """The tokens of an event, and the end of the hole that they fill."""
    parts = [Part(event.hole, token) for token in event.token_ids]
    if event.end_token_id is not None and event.finish_reason is None:
        parts.append(Part(event.hole, event.end_token_id))
    return parts
