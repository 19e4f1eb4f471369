"""Who runs in a round: the waiting queue, the running rows, and what leaves them."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition

from vdiff_kserve.engine.memory import RowMemory
from vdiff_kserve.engine.request import (
    EngineError,
    EngineStoppedError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.engine.row import Row

REFRESH_SHARE = 0.25
"""Share of a round's token budget that refreshes get, however many rows only reuse."""


@dataclass(frozen=True)
class Round:
    """What the next round does.

    Attributes:
        rows: those that take a denoising step, longest pass first.
        sliced: a row whose pass alone exceeds the budget: it runs some layers now, the rest in
            later rounds, and takes its step when all are done.
        layers: how many layers of it to run now.
        expired: rows that are out because their deadline passed, with what to tell them.
    """

    rows: Sequence[Row]
    sliced: Row | None = None
    layers: int = 0
    expired: Sequence[tuple[Row, EngineError]] = ()


class Scheduler:
    """Admission of rows to a bounded number of slots and cache places, and the rounds they run in.

    Rows wait in order of priority, then arrival. A running row takes part in every round, except
    that passes over whole canvases are bounded by a number of tokens per round: the row that ran
    last longest ago goes first, and one that does not fit in any round is spread over several.

    `submit`, `abort` and `close` may be called from any thread; the rest belongs to the engine's.
    """

    def __init__(
        self,
        memory: RowMemory,
        max_num_seqs: int,
        max_queue: int,
        max_num_batched_tokens: int,
        num_layers: int,
    ) -> None:
        self._memory = memory
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._budget = max_num_batched_tokens
        self._num_layers = num_layers
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._submitted = 0
        self._rounds = 0
        self._changed = Condition()
        self._closed: EngineError | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none of them. Places are counted beyond what free slots take at once.

        Raises:
            QueueFullError: they do not all fit.
            EngineStoppedError: the engine no longer takes requests.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed
            occupied = sum(row.finish_reason is None for row in self._running)
            free_slots = self._max_num_seqs - occupied
            if len(self._waiting) + len(rows) > free_slots + self._max_queue:
                raise QueueFullError(
                    f"The server is at its limit of {self._max_num_seqs} running and "
                    f"{self._max_queue} waiting requests. Try again later."
                )
            for row in rows:
                self._submitted += 1
                row.place = (row.request.priority, self._submitted)
                insort(self._waiting, row, key=lambda waiting: waiting.place)
            self._changed.notify()

    def abort(self, row: Row) -> None:
        """Take a row out before the next round; nothing happens when it is already gone."""
        with self._changed:
            row.aborted = True
            self._changed.notify()

    def close(self, reason: EngineError) -> list[Row]:
        """Take no more rows; returns those that were waiting or running, now forgotten."""
        with self._changed:
            self._closed = reason
            dropped = [
                row
                for row in (*self._running, *self._waiting)
                if not row.aborted and row.finish_reason is None
            ]
            self._leave(self._running)
            self._waiting.clear()
            self._changed.notify()
        return dropped

    def wait_for_work(self) -> None:
        """Return when there is a row to run or to tell that its time is over.

        Raises:
            EngineStoppedError: the scheduler was closed.
        """
        with self._changed:
            while not (self._running or self._waiting):
                if self._closed is not None:
                    raise EngineStoppedError(str(self._closed))
                self._changed.wait()

    def next_round(self) -> Round:
        """Let rows in and out, and choose what runs; may be empty.

        Raises:
            EngineStoppedError: the scheduler was closed.
        """
        with self._changed:
            if self._closed is not None:
                raise EngineStoppedError(str(self._closed))
            expired = self._take_out()
            self._admit()
            return self._plan(expired)

    def release(self, rows: Sequence[Row]) -> None:
        """Forget rows that finished or failed; their slots are free for the next round."""
        with self._changed:
            self._leave(rows)

    def _leave(self, rows: Sequence[Row]) -> None:
        if rows:
            self._running = [row for row in self._running if row not in rows]
        for row in rows:
            row.drop_pass()
            self._memory.release(row)

    def _take_out(self) -> list[tuple[Row, EngineError]]:
        """Forget aborted rows and those whose deadline passed; returns the latter."""
        now = time.monotonic()

        def is_over(row: Row) -> bool:
            deadline = row.request.deadline
            return not row.aborted and deadline is not None and deadline <= now

        waited = QueueTimeoutError("The request's time was over before it got a place to run.")
        ran = RequestTimeoutError("The request's time was over before its answer was complete.")
        late: list[tuple[Row, EngineError]] = [
            (row, waited) for row in self._waiting if is_over(row)
        ]
        late += [(row, ran) for row in self._running if is_over(row)]
        for row, _ in late:
            row.aborted = True
        self._waiting = [row for row in self._waiting if not row.aborted]
        self._leave([row for row in self._running if row.aborted])
        return late

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            if not self._memory.reserve(self._waiting[0]):
                return
            row = self._waiting.pop(0)
            row.admitted()
            self._running.append(row)

    def _plan(self, expired: Sequence[tuple[Row, EngineError]]) -> Round:
        """All passes over parts of canvases, and those over whole ones that the budget allows.

        The whole pass that waited longest always makes progress, with half the budget when it does
        not fit, so that none waits forever and a long one leaves room for others.
        """
        self._rounds += 1
        rows = [row for row in self._running if not row.refreshes_next]
        refreshes = [row for row in self._running if row.refreshes_next]
        refreshes.sort(key=lambda row: (row.last_round, row.place))
        budget = self._budget - sum(row.pass_tokens for row in rows)
        # Counted in tokens times layers: a pass may stop between layers.
        left = max(budget, int(self._budget * REFRESH_SHARE)) * self._num_layers
        sliced, layers = None, 0
        for row in refreshes:
            tokens, layers_left = row.pass_tokens, row.layers_left(self._num_layers)
            if tokens * layers_left <= left:
                rows.append(row)
                left -= tokens * layers_left
            elif row is refreshes[0]:
                share = left // 2 if len(refreshes) > 1 else left
                sliced, layers = row, min(max(1, share // tokens), layers_left)
                row.last_round = self._rounds
                left = max(0, left - tokens * layers)
        for row in rows:
            row.last_round = self._rounds
        if sliced is not None and layers == sliced.layers_left(self._num_layers):
            rows.append(sliced)
            sliced, layers = None, 0
        rows.sort(key=len, reverse=True)
        return Round(rows, sliced, layers, expired)
