"""Who runs in a round: the waiting queue, the running rows, and what leaves them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Condition

from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.request import EngineError, EngineStoppedError, QueueFullError
from vdiff_kserve.engine.row import Row


class Scheduler:
    """First come, first served admission of rows to a bounded number of slots and cache places.

    `submit` and `abort` may be called from any thread; the rest belongs to the engine's thread.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_queue: int,
        cache: KVCache,
        auxiliary_cache: KVCache | None = None,
    ) -> None:
        self._cache = cache
        self._auxiliary_cache = auxiliary_cache
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
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
            self._waiting.extend(rows)
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
            dropped = [row for row in (*self._running, *self._waiting) if not row.aborted]
            self._leave(self._running)
            self._waiting.clear()
            self._changed.notify()
        return dropped

    def next_round(self) -> list[Row]:
        """The rows of the next round, longest first; waits until there are some.

        Raises:
            EngineStoppedError: the scheduler was closed.
        """
        with self._changed:
            while True:
                if self._closed is not None:
                    raise EngineStoppedError(str(self._closed))
                self._admit()
                if self._running:
                    return sorted(self._running, key=len, reverse=True)
                self._changed.wait()

    def release(self, rows: Sequence[Row]) -> None:
        """Forget rows that finished or failed; their slots are free for the next round."""
        with self._changed:
            self._leave(rows)

    def _leave(self, rows: Sequence[Row]) -> None:
        self._running = [row for row in self._running if row not in rows]
        for row in rows:
            self._give_back(row)

    def _admit(self) -> None:
        self._leave([row for row in self._running if row.aborted])
        self._waiting = deque(row for row in self._waiting if not row.aborted)
        while self._waiting and len(self._running) < self._max_num_seqs:
            if not self._reserve(self._waiting[0]):
                return
            self._running.append(self._waiting.popleft())

    def _reserve(self, row: Row) -> bool:
        """Reserve all the cache that `row` will ever need, or nothing."""
        for _ in range(row.cache_runs):
            offset = self._cache.reserve(len(row))
            if offset is None:
                self._give_back(row)
                return False
            row.cache_offsets += (offset,)
        if row.uses_auxiliary and self._auxiliary_cache is not None:
            row.auxiliary_offset = self._auxiliary_cache.reserve(len(row))
            if row.auxiliary_offset is None:
                self._give_back(row)
                return False
        return True

    def _give_back(self, row: Row) -> None:
        for offset in row.cache_offsets:
            self._cache.release(offset)
        row.cache_offsets = ()
        if row.auxiliary_offset is not None and self._auxiliary_cache is not None:
            self._auxiliary_cache.release(row.auxiliary_offset)
            row.auxiliary_offset = None
