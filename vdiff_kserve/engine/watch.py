"""Notices a round that does not end: a GPU that hangs, a rank that is gone, a deadlock.

How long is too long depends on the machine, the model and the round, so it is measured: rounds are
compared with earlier ones that computed about as many tokens.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from threading import Event, Thread

LOOK_SECONDS = 0.25
"""How often a round in flight is looked at. Looks are counted, not seconds: a process that stood
still as a whole, or got no processor, sees few of them and calls nobody stuck."""
PATIENCE = 10.0
"""A round may take this many times what the slowest recent one of its size took."""
LEAST_SECONDS = 3.0
"""What a round may always take: hiccups of a machine are shorter."""
FIRST_SECONDS = 60.0
"""What the first rounds of a size may always take: memory is touched, kernels are compiled."""
REMEMBERED_ROUNDS = 32
"""Rounds of each size that are remembered."""

logger = logging.getLogger("kserve.vdiff.engine")


class RoundTimes:
    """How long rounds took lately, by size: tokens within a power of two are of one size."""

    def __init__(self) -> None:
        self._of_size: dict[int, deque[float]] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """A round is over."""
        recent = self._of_size.setdefault(tokens.bit_length(), deque(maxlen=REMEMBERED_ROUNDS))
        recent.append(seconds)

    def limit(self, tokens: int) -> float:
        """Seconds after which a round of so many tokens is taken to be stuck.

        A size that is new is expected to take as much longer than the next smaller one as it has
        more tokens.
        """
        size = tokens.bit_length()
        if size in self._of_size:
            return max(LEAST_SECONDS, PATIENCE * max(self._of_size[size]))
        smaller = max((known for known in self._of_size if known < size), default=None)
        if smaller is None:
            return FIRST_SECONDS
        expected = min(self._of_size[smaller]) * 2 ** (size - smaller)
        return max(FIRST_SECONDS, PATIENCE * expected)


@dataclass(eq=False)
class RoundInFlight:
    """A round that has begun.

    Attributes:
        tokens: that it computes; 0 while that is not known yet.
        limit: seconds that it may take.
    """

    limit: float
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


class RoundWatch:
    """Looks at the engine's rounds from a thread of its own.

    Args:
        watched: the engine's thread.
        seconds: limit of every round; None measures, 0 has none.

    Attributes:
        stuck: whether the round in flight has taken longer than it may. It may still end.
    """

    def __init__(self, watched: Thread, seconds: float | None) -> None:
        self.stuck = False
        self._watched = watched
        self._seconds = seconds
        self._times = RoundTimes()
        self._limit = FIRST_SECONDS if seconds is None else seconds
        self._round: RoundInFlight | None = None
        self._seen: RoundInFlight | None = None
        self._looks = 0
        self._over = Event()
        self._thread = Thread(target=self._run, name="vdiff-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        if self._seconds != 0:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def begin(self) -> None:
        """A round begins, of a size that is not known yet: planning it may take as long as the last
        one, whose end other ranks may still compute."""
        self._round = RoundInFlight(self._limit)

    def planned(self, tokens: int) -> None:
        """The size of the round is known."""
        assert self._round is not None
        self._round.tokens = tokens
        if self._seconds is None:
            self._round.limit = self._limit = self._times.limit(tokens)

    def end(self) -> None:
        """The round is over."""
        assert self._round is not None
        if self._round.tokens:
            self._times.add(self._round.tokens, time.perf_counter() - self._round.started)
        self._round = None

    def look(self) -> None:
        """Compare the round in flight with its limit, every `LOOK_SECONDS`."""
        now = self._round
        if now is None or now is not self._seen:
            if self.stuck:
                logger.warning("The round that was stuck is over.")
            self._seen, self._looks, self.stuck = now, 0, False
            return
        self._looks += 1
        if not self.stuck and self._looks * LOOK_SECONDS > now.limit:
            self.stuck = True
            logger.critical(
                "A round of %d tokens has not ended after %.1f s: the engine is stuck. "
                "Its thread is at:\n%s",
                now.tokens, now.limit, self._stack(),
            )  # fmt: skip

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(no frame)"

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.look()
