"""The published loops' own habits, for comparing with what they recorded.

The engine's rows spend no pass that commits nothing and leave no mask behind. The references
sometimes do; each class here is an engine row with one reference's habit.
"""

from __future__ import annotations

from vdiff_kserve.engine import Engine
from vdiff_kserve.engine.row import Row
from vdiff_kserve.sampler import block_steps


class GsaiRow(Row):
    """LLaDA's `generate` runs all its steps, also those whose quota is 0."""

    @property
    def _block_done(self) -> bool:
        return super()._block_done and self._block_step >= self._block_steps

    def _enter_block(self, start: int) -> None:
        super()._enter_block(start)
        self._block_steps = block_steps(self.params, self.request.max_tokens, self._block_masks)


class FastDllmOrigRow(Row):
    """Fast-dLLM's first version makes at least one cached pass per block, needed or not."""

    @property
    def _block_done(self) -> bool:
        cached_pass_made = self.params.cache == "none" or self._block_step >= 2
        return super()._block_done and cached_pass_made


class FastDllmMainRow(Row):
    """Fast-dLLM's later version stops a dual-cache block after its steps, masks or not, and lets
    the next block's first pass fill what is left."""


def engine_of(row_class: type[Row]) -> type[Engine]:
    """An engine whose rows are of `row_class`."""
    return type(f"{row_class.__name__}Engine", (Engine,), {"row_class": row_class})
