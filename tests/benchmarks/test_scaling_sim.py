"""The simulation obeys what is known without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling_sim import Simulation, World, row

WORLD = World(
    replicas=4, front_ends=1, routing="pool", load=0.5, slots=8, round_time=0.03, row_time=0.002,
    front_time=0.001, chunk_time=0.0001, hop_time=0.001, tokens_per_step=4.0, mean_tokens=64.0,
    mean_time_to_loss=1e9, load_time=5.0, seconds=60.0,
)  # fmt: skip


@pytest.mark.parametrize("routing", ["pool", "random", "turns"])
def test_below_capacity_all_that_comes_is_answered(routing) -> None:
    outcome = Simulation(replace(WORLD, routing=routing)).run()
    assert outcome.requests_per_second == pytest.approx(0.5 * WORLD.capacity, rel=0.2)
    assert np.median(outcome.latencies) < 3 * 16 * WORLD.full_round
    assert outcome.front_end_share < 1


def test_beyond_capacity_no_more_is_answered_than_there_is() -> None:
    outcome = Simulation(replace(WORLD, load=2.0)).run()
    assert outcome.requests_per_second <= WORLD.capacity * 1.2
    assert np.median(outcome.latencies) > np.median(Simulation(WORLD).run().latencies)


def test_a_front_end_that_is_too_slow_falls_behind() -> None:
    outcome = Simulation(replace(WORLD, front_time=0.2)).run()
    assert outcome.front_end_share > 1
    assert outcome.requests_per_second < 6


def test_what_is_lost_begins_again() -> None:
    outcome = Simulation(replace(WORLD, mean_time_to_loss=20.0, load=0.3)).run()
    assert outcome.losses > 3
    assert outcome.replayed > 0
    assert outcome.requests_per_second == pytest.approx(0.3 * WORLD.capacity, rel=0.25)


def test_a_row_of_the_table_has_its_twelve_cells() -> None:
    assert row(replace(WORLD, seconds=6.0)).count("|") == 13
