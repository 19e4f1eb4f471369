"""Rounds of the engine as metrics."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from prometheus_client import REGISTRY

from vdiff_kserve.engine import RoundReport
from vdiff_kserve.observability import rounds
from vdiff_kserve.observability.rounds import RoundMetrics

NAMES = count()
REPORT = RoundReport(
    rows=3,
    refreshes=2,
    reuses=1,
    commits=1,
    auxiliary=1,
    committed=7,
    accepted=(4,),
    block_steps=(8, 2),
    computed=30,
    cached=10,
    attended=900,
    plan_seconds=0.001,
    forward_seconds=0.2,
    sample_seconds=0.03,
    apply_seconds=0.004,
)
IDLE = replace(REPORT, computed=0, cached=0)


@pytest.fixture
def name() -> str:
    return f"model-{next(NAMES)}"


def value(metric: str, model_name: str, **labels: Any) -> float:
    found = REGISTRY.get_sample_value(metric, {"model_name": model_name, **labels})
    assert found is not None, f"{metric} {labels}"
    return found


def test_every_series_is_there_before_the_first_round(name: str) -> None:
    RoundMetrics(name)
    for kind in ("refresh", "reuse", "commit", "auxiliary"):
        assert value("vdiff_forwards_total", name, kind=kind) == 0
    for phase in ("plan", "forward", "sample", "apply"):
        assert value("vdiff_round_seconds_count", name, phase=phase) == 0
    assert value("vdiff_parallel_tokens_decoded_total", name) == 0
    assert value("vdiff_kv_cache_hit_rate", name) == 0


def test_a_round_is_counted_once_under_each_name(name: str) -> None:
    metrics = RoundMetrics(name)
    metrics.observe(REPORT)
    metrics.observe(REPORT)
    forwards = [value("vdiff_forwards_total", name, kind=kind) for kind in KINDS]
    assert forwards == [4, 2, 2, 2]
    assert value("vdiff_forward_tokens_total", name, source="computed") == 60
    assert value("vdiff_forward_tokens_total", name, source="cached") == 20
    assert value("vdiff_forward_attended_total", name) == 1800
    assert value("vdiff_parallel_tokens_decoded_total", name) == 14
    assert value("vdiff_round_rows_sum", name) == 6
    assert value("vdiff_round_rows_count", name) == 2
    assert value("vdiff_apd_accepted_tokens_sum", name) == 8
    assert value("vdiff_block_denoising_steps_sum", name) == 20
    assert value("vdiff_block_denoising_steps_count", name) == 4
    seconds = [value("vdiff_round_seconds_sum", name, phase=phase) for phase in PHASES]
    assert seconds == pytest.approx([0.002, 0.4, 0.06, 0.008])


KINDS = ("refresh", "reuse", "commit", "auxiliary")
PHASES = ("plan", "forward", "sample", "apply")


def test_the_hit_rate_forgets_old_rounds(name: str) -> None:
    metrics = RoundMetrics(name)
    metrics.observe(replace(REPORT, computed=0, cached=1000))
    assert value("vdiff_kv_cache_hit_rate", name) == 1
    for _ in range(rounds.WINDOW):
        metrics.observe(REPORT)
    assert value("vdiff_kv_cache_hit_rate", name) == 0.25


def test_the_hit_rate_stays_when_rounds_have_no_tokens(name: str) -> None:
    metrics = RoundMetrics(name)
    metrics.observe(REPORT)
    for _ in range(rounds.WINDOW):
        metrics.observe(IDLE)
    assert value("vdiff_kv_cache_hit_rate", name) == 0.25


def test_counting_a_round_costs_next_to_nothing(name: str) -> None:
    """Processor time of the fastest of several runs, since the machine does other things too."""
    metrics = RoundMetrics(name)
    fastest = min(seconds_per_round(metrics) for _ in range(10))
    assert fastest < 50e-6


def seconds_per_round(metrics: RoundMetrics, times: int = 200) -> float:
    before = time.thread_time()
    for _ in range(times):
        metrics.observe(REPORT)
    return (time.thread_time() - before) / times
