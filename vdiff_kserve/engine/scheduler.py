"""Who runs in a round: the waiting queue, the running rows, and what leaves them."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition

from vdiff_kserve.engine.lockstep import Lockstep, News
from vdiff_kserve.engine.memory import RowMemory
from vdiff_kserve.engine.request import (
    EngineError,
    EngineStoppedError,
    GenerationRequest,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.engine.row import Row


@dataclass(frozen=True)
class Round:
    """What the next round does.

    Attributes:
        rows: those that take a denoising step, longest pass first.
        sliced: a row whose pass alone exceeds the budget: it runs some layers now, the rest in
            later rounds, and takes its step when all are done.
        layers: how many layers of it to run now.
        expired: rows that are out because their deadline passed, with what to tell them.
        tokens: that its passes compute; those of a sliced row by its share of the layers.
    """

    rows: Sequence[Row]
    sliced: Row | None = None
    layers: int = 0
    expired: Sequence[tuple[Row, EngineError]] = ()
    tokens: int = 0


class Scheduler:
    """Admission of rows to a bounded number of slots and cache places, and the rounds they run in.

    Rows wait in order of priority, then arrival. A running row takes part in every round, except
    that passes over whole canvases are bounded by a number of tokens per round: the row that ran
    last longest ago goes first, and one that does not fit in any round is spread over several.

    `submit`, `abort` and `close` may be called from any thread; the rest belongs to the engine's.

    Args:
        lockstep: tells other ranks what a round starts from; None when there are none.
    """

    def __init__(
        self,
        memory: RowMemory,
        max_num_seqs: int,
        max_queue: int,
        max_num_batched_tokens: int,
        num_layers: int,
        lockstep: Lockstep | None = None,
    ) -> None:
        self._memory = memory
        self._lockstep = lockstep
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._budget = max_num_batched_tokens
        self._num_layers = num_layers
        self._arrived: list[Row] = []
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._submitted = 0
        self._rounds = 0
        self._changed = Condition()
        self._closed: EngineError | None = None

    @property
    def num_running(self) -> int:
        return len(self._running) if self._closed is None else 0

    @property
    def num_waiting(self) -> int:
        return len(self._arrived) + len(self._waiting) if self._closed is None else 0

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none of them. Those that are over or aborted take no place any more,
        though they leave with the next round.

        Raises:
            QueueFullError: more rows would be unfinished than may run and wait.
            EngineStoppedError: the engine no longer takes requests.
        """
        with self._changed:
            if self._closed is not None:
                raise EngineStoppedError(str(self._closed))
            held = (*self._running, *self._waiting, *self._arrived)
            unfinished = sum(not row.aborted and row.finish_reason is None for row in held)
            if unfinished + len(rows) > self._max_num_seqs + self._max_queue:
                raise QueueFullError(
                    f"The server is at its limit of {self._max_num_seqs} running and "
                    f"{self._max_queue} waiting requests. Try again later."
                )
            for row in rows:
                self._submitted += 1
                row.place = (row.request.priority, self._submitted)
                self._arrived.append(row)
            self._changed.notify()

    def abort(self, row: Row) -> None:
        """Take a row out before the next round; nothing happens when it is already gone."""
        with self._changed:
            row.aborted = True
            self._changed.notify()

    def close(self, reason: EngineError) -> list[Row]:
        """Take no more rows; returns those that are waiting or running, the first time."""
        with self._changed:
            if self._closed is not None:
                return []
            self._closed = reason
            self._changed.notify()
            return [
                row
                for row in (*self._running, *self._waiting, *self._arrived)
                if not row.aborted and row.finish_reason is None
            ]

    def forget(self) -> None:
        """Let all rows go: there is no further round."""
        with self._changed:
            self._leave(self._running)
            self._waiting.clear()
            self._arrived.clear()

    def wait_for_work(self) -> None:
        """Return when there is a row to run or to tell that its time is over.

        Raises:
            EngineStoppedError: the scheduler was closed.
        """
        with self._changed:
            while not (self._running or self.num_waiting):
                if self._closed is not None:
                    raise EngineStoppedError(str(self._closed))
                self._changed.wait()

    def next_round(self) -> Round:
        """Let rows in and out, and choose what runs; may be empty.

        Raises:
            EngineStoppedError: the scheduler was closed.
        """
        with self._changed:
            news = self._news()
        if self._lockstep is not None:  # without the lock: a rank that hangs must not hold clients
            news = self._lockstep.share(news)
        if news.stopped:
            raise EngineStoppedError("The first rank stopped.")
        with self._changed:
            expired = self._take_out(news)
            self._admit()
            return self._plan(expired)

    def dismiss(self) -> None:
        """Tell the other ranks, if there are any, that there is no further round."""
        if self._lockstep is not None:
            self._lockstep.share(News(stopped=True))

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

    def _news(self) -> News:
        """What the next round starts from; rows that arrived wait from now on."""
        if self._closed is not None:
            raise EngineStoppedError(str(self._closed))
        arrived, self._arrived = self._arrived, []
        for row in arrived:
            self._wait(row)
        now = time.monotonic()
        aborted, expired = set(), set()
        for row in (*self._waiting, *self._running):
            deadline = row.request.deadline
            if row.aborted:
                aborted.add(row.number)
            elif deadline is not None and deadline <= now:
                expired.add(row.number)
        submitted = tuple((row.number, row.request) for row in arrived)
        return News(submitted, frozenset(aborted), frozenset(expired))

    def _wait(self, row: Row) -> None:
        insort(self._waiting, row, key=lambda waiting: waiting.place)

    def _take_out(self, news: News) -> list[tuple[Row, EngineError]]:
        """Forget aborted rows and those whose deadline passed; returns the latter."""
        gone = news.aborted | news.expired
        if not gone:
            return []
        waited = QueueTimeoutError("The request's time was over before it got a place to run.")
        ran = RequestTimeoutError("The request's time was over before its answer was complete.")
        late: list[tuple[Row, EngineError]] = [
            (row, waited) for row in self._waiting if row.number in news.expired
        ]
        late += [(row, ran) for row in self._running if row.number in news.expired]
        for row, _ in late:
            row.aborted = True
        self._waiting = [row for row in self._waiting if row.number not in gone]
        self._leave([row for row in self._running if row.number in gone])
        return late

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            if not self._memory.reserve(self._waiting[0]):
                return
            row = self._waiting.pop(0)
            row.admitted()
            if row.finish_reason is None:
                self._running.append(row)
            else:
                self._memory.release(row)

    def _plan(self, expired: Sequence[tuple[Row, EngineError]]) -> Round:
        """All passes over parts of canvases, and those over whole ones that the budget allows.

        The whole pass that waited longest always makes progress, with half the budget when it does
        not fit, so that none waits forever and a long one leaves room for others.
        """
        self._rounds += 1
        rows: list[Row] = []
        refreshes: list[Row] = []
        for row in self._running:
            (refreshes if row.refreshes_next else rows).append(row)
        refreshes.sort(key=lambda row: (row.last_round, row.place))
        # Counted in tokens times layers: a pass may stop between layers.
        left = self._budget * self._num_layers
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
        tokens = sum(row.pass_tokens for row in rows)
        if sliced is not None:
            tokens += sliced.pass_tokens * layers // self._num_layers
        return Round(rows, sliced, layers, expired, tokens)


class FollowingScheduler(Scheduler):
    """The scheduler of a further rank: its rows are those that the first rank tells of.

    Args:
        make_row: the row of a request; nobody listens to it.
    """

    def __init__(
        self,
        memory: RowMemory,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_layers: int,
        lockstep: Lockstep,
        make_row: Callable[[GenerationRequest], Row],
    ) -> None:
        super().__init__(
            memory, max_num_seqs, 0, max_num_batched_tokens, num_layers, lockstep=lockstep
        )
        self._make_row = make_row

    def wait_for_work(self) -> None:
        """The next round begins when the first rank says so."""

    def dismiss(self) -> None:
        """The first rank tells when the end is, not this one."""

    def _news(self) -> News:
        """Nothing: what counts are the first rank's."""
        return News()

    def _take_out(self, news: News) -> list[tuple[Row, EngineError]]:
        for number, request in news.submitted:
            row = self._make_row(request)
            row.place = (request.priority, number)
            self._wait(row)
        return super()._take_out(news)
