"""What the engine's rounds do, as metrics."""

from __future__ import annotations

from collections import deque

from vdiff_kserve.engine import RoundReport
from vdiff_kserve.observability import families

WINDOW = 256
"""Rounds that `vdiff_kv_cache_hit_rate` looks back."""


class RoundMetrics:
    """Counts the rounds of one model's engine.

    `observe` is meant as the engine's observer. It runs on the engine's thread, once a round, so
    every label is looked up beforehand.
    """

    def __init__(self, model_name: str) -> None:
        forwards = [families.FORWARDS.labels(model_name, kind) for kind in families.FORWARD_KINDS]
        self._refreshes, self._reuses, self._commits, self._auxiliary = forwards
        sources = [families.FORWARD_TOKENS.labels(model_name, s) for s in families.TOKEN_SOURCES]
        self._computed, self._cached = sources
        self._attended = families.ATTENDED.labels(model_name)
        phases = [families.ROUND_SECONDS.labels(model_name, phase) for phase in families.PHASES]
        self._plan, self._forward, self._sample, self._apply = phases
        self._rows = families.ROUND_ROWS.labels(model_name)
        self._decoded = families.DECODED_TOKENS.labels(model_name)
        self._accepted = families.APD_ACCEPTED.labels(model_name)
        self._block_steps = families.BLOCK_STEPS.labels(model_name)
        self._hit_rate = families.HIT_RATE.labels(model_name)
        self._recent: deque[tuple[int, int]] = deque([(0, 0)] * WINDOW)
        self._recent_computed = 0
        self._recent_cached = 0

    def observe(self, report: RoundReport) -> None:
        """Count a round."""
        if report.rows:
            self._rows.observe(report.rows)
        self._refreshes.inc(report.refreshes)
        self._reuses.inc(report.reuses)
        self._commits.inc(report.commits)
        self._auxiliary.inc(report.auxiliary)
        self._decoded.inc(report.committed)
        self._computed.inc(report.computed)
        self._cached.inc(report.cached)
        self._attended.inc(report.attended)
        self._plan.observe(report.plan_seconds)
        self._forward.observe(report.forward_seconds)
        self._sample.observe(report.sample_seconds)
        self._apply.observe(report.apply_seconds)
        for accepted in report.accepted:
            self._accepted.observe(accepted)
        for steps in report.block_steps:
            self._block_steps.observe(steps)
        self._look_back(report.computed, report.cached)

    def _look_back(self, computed: int, cached: int) -> None:
        old_computed, old_cached = self._recent.popleft()
        self._recent.append((computed, cached))
        self._recent_computed += computed - old_computed
        self._recent_cached += cached - old_cached
        tokens = self._recent_computed + self._recent_cached
        if tokens:
            self._hit_rate.set(self._recent_cached / tokens)
