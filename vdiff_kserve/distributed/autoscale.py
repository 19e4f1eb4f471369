"""How many replicas there should be."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

UP_AFTER_SECONDS = 2.0
"""A burst that is over sooner starts no replica: loading one takes longer."""
DOWN_AFTER_SECONDS = 60.0
"""A replica is let go when it was not needed for this long."""


@dataclass(frozen=True)
class Bounds:
    """Fewest and most replicas."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Read "4" or "1:4"."""
        low, _, high = text.partition(":")
        return cls(int(low), int(high or low))


class Autoscaler:
    """Follows the tokens that accepted answers still lack.

    Args:
        tokens_per_replica: a replica more is wanted for every so many.
    """

    def __init__(self, bounds: Bounds, tokens_per_replica: int) -> None:
        self._bounds = bounds
        self._tokens_per_replica = tokens_per_replica
        self._since: float | None = None
        self._direction = 0
        self.target = bounds.low

    def look(self, outstanding_tokens: int, now: float) -> int:
        """The number of replicas, after a look at what is to be done.

        It changes when the same direction was right for a while: up to what is needed, down by one.
        """
        needed = ceil(outstanding_tokens / self._tokens_per_replica)
        needed = min(max(needed, self._bounds.low), self._bounds.high)
        direction = (needed > self.target) - (needed < self.target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        if direction and self._since is not None:
            waited = now - self._since
            if direction > 0 and waited >= UP_AFTER_SECONDS:
                self.target, self._since = needed, now
            elif direction < 0 and waited >= DOWN_AFTER_SECONDS:
                self.target, self._since = self.target - 1, now
        return self.target
