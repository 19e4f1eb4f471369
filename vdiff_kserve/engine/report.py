"""What a round did, for whoever watches the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vdiff_kserve.engine.row import Decision, Row


@dataclass(frozen=True)
class RoundReport:
    """One round of the engine's loop.

    Attributes:
        rows: rows that took a denoising step; none where only layers of a long pass ran.
        refreshes: rows whose forward pass ran over their whole visible canvas.
        reuses: rows whose forward pass ran over a part, the rest read from the cache.
        commits: rows whose pass also kept the final keys and values of a finished block.
        auxiliary: rows whose draft the auxiliary model checked.
        committed: tokens written to canvases.
        accepted: tokens committed by each row that the auxiliary model checked.
        block_steps: denoising steps of each block that was finished.
        computed: tokens that the forward passes ran over.
        cached: tokens that they read from the cache instead.
        attended: pairs of a computed token and one that it sees, in each layer.
        plan_seconds: choosing the rows of the round; waiting for work is not part of it.
        forward_seconds: the diffusion model's forward passes.
        sample_seconds: logits, candidates, the auxiliary model's check, and choices.
        apply_seconds: writing tokens and sending what became final.
    """

    rows: int
    refreshes: int
    reuses: int
    commits: int
    auxiliary: int
    committed: int
    accepted: tuple[int, ...]
    block_steps: tuple[int, ...]
    computed: int
    cached: int
    attended: int
    plan_seconds: float
    forward_seconds: float
    sample_seconds: float
    apply_seconds: float


RoundObserver = Callable[[RoundReport], None]
"""Told of every round on the engine's thread; must not block or raise."""


class RoundClock:
    """Measures a round from its beginning; `seconds` are the model runner's running totals."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds
        self._before = dict(seconds)
        self._started = self._planned = time.perf_counter()

    def planned(self) -> None:
        """The round's rows are chosen."""
        self._planned = time.perf_counter()

    def report(self, stepped: Sequence[tuple[Row, Decision]]) -> RoundReport:
        """What the round did, now that it is over."""
        forward, sample = (self._seconds[k] - self._before[k] for k in ("forward", "sample"))
        kinds = [row.pass_kind for row, _ in stepped]
        blocks = (row.finished_block_steps for row, _ in stepped)
        spans = [decision.span for _, decision in stepped]
        checked = [decision for _, decision in stepped if decision.auxiliary]
        spent = time.perf_counter() - self._planned
        return RoundReport(
            rows=len(stepped),
            refreshes=kinds.count("refresh"),
            reuses=kinds.count("reuse"),
            commits=kinds.count("commit"),
            auxiliary=len(checked),
            committed=sum(row.num_committed(decision) for row, decision in stepped),
            accepted=tuple(len(decision.positions) for decision in checked),
            block_steps=tuple(steps for steps in blocks if steps is not None),
            computed=sum(span.queries for span in spans),
            cached=sum(span.keys - span.queries for span in spans),
            attended=sum(span.queries * span.keys for span in spans),
            plan_seconds=self._planned - self._started,
            forward_seconds=forward,
            sample_seconds=sample,
            apply_seconds=spent - forward - sample,
        )
