"""How many replicas a load asks for."""

from __future__ import annotations

from vdiff_kserve.distributed.autoscale import (
    DOWN_AFTER_SECONDS,
    UP_AFTER_SECONDS,
    Autoscaler,
    Bounds,
)


def test_bounds_are_read() -> None:
    assert Bounds.parse("4") == Bounds(4, 4)
    assert Bounds.parse("1:12") == Bounds(1, 12)


def test_a_load_that_stays_brings_what_it_needs() -> None:
    scaler = Autoscaler(Bounds(1, 4), tokens_per_replica=100)
    assert scaler.look(250, now=0) == 1
    assert scaler.look(250, now=UP_AFTER_SECONDS - 0.1) == 1
    assert scaler.look(250, now=UP_AFTER_SECONDS) == 3
    assert scaler.look(250, now=5) == 3
    assert scaler.look(10_000, now=10) == 3
    assert scaler.look(10_000, now=10 + UP_AFTER_SECONDS) == 4


def test_a_short_burst_brings_nothing() -> None:
    scaler = Autoscaler(Bounds(1, 4), tokens_per_replica=100)
    scaler.look(500, now=0)
    scaler.look(0, now=1)
    assert scaler.look(500, now=UP_AFTER_SECONDS) == 1


def test_idle_replicas_go_one_by_one_and_not_below_the_fewest() -> None:
    scaler = Autoscaler(Bounds(2, 8), tokens_per_replica=100)
    scaler.look(800, now=0)
    assert scaler.look(800, now=5) == 8
    targets = [scaler.look(0, now=10 + i * DOWN_AFTER_SECONDS) for i in range(9)]
    assert targets == [8, 7, 6, 5, 4, 3, 2, 2, 2]
    assert scaler.look(250, now=10_000) == 2
