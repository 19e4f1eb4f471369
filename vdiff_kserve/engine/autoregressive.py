"""Rows of causal language models: one token after the other."""

from __future__ import annotations

from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.models import RowSpan


class AutoregressiveRow(Row):
    """One token per pass, each predicted by the position before it.

    The first pass computes the prompt; with a cache, every other one computes what was written
    since the one before.
    """

    _stored = 0
    """Canvas positions from the left whose keys and values are in the cache."""

    def _enter_block(self, start: int) -> None:
        self.block_start = start
        self.block_end = start + 1
        self._block_step = 0
        self._block_passes = 0

    @property
    def quota(self) -> int:
        return 1

    def next_span(self) -> RowSpan:
        end, start = self.block_start, 0
        if self.cache_offsets:
            start = max(self._stored, self.cached_tokens)
        offset = self.cache_offsets[0] if self.cache_offsets else None
        return RowSpan(start, end - start, end, end - 1, 1, offset)

    def apply(self, decision: Decision) -> None:
        self._stored = decision.span.keys
        super().apply(decision)

    @property
    def refreshes_next(self) -> bool:
        return not self.cache_offsets or self.is_fresh

    @property
    def shares_prefix(self) -> bool:
        return self.cache_runs == 1

    @property
    def final_tokens(self) -> int:
        return self._stored

    @property
    def reusable_prompt(self) -> tuple[int, ...]:
        """The token that predicts the answer's first one is always computed."""
        return self.request.prompt_ids[:-1]

    def _skip_idle_steps(self) -> None:
        """Every step commits."""
