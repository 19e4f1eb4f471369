"""The arithmetic of the quality-speed sweep."""

from __future__ import annotations

import pytest

from benchmarks.sweep import (
    Outcome,
    Trial,
    area_under_parallelism,
    areas,
    fastest_within,
    trials,
)
from vdiff_kserve.openai.decoding import ModelTraits, resolve
from vdiff_kserve.sampler import DecodingParams


def outcome(curve: str, accuracy: int, tokens: int, seconds: float) -> Outcome:
    result = Outcome(Trial(curve, "", DecodingParams()), seconds, tokens, forwards=100)
    result.prompts["all"], result.right["all"] = 100, accuracy
    return result


def test_the_area_of_one_point_is_its_rectangle() -> None:
    assert area_under_parallelism([(2.0, 80.0)]) == 160


def test_equal_accuracy_adds_the_plain_area() -> None:
    assert area_under_parallelism([(1.0, 80.0), (3.0, 80.0)]) == pytest.approx(80 + 2 * 80)


def test_lost_accuracy_weighs_less_and_much_lost_nothing() -> None:
    full = area_under_parallelism([(1.0, 80.0), (3.0, 80.0)])
    assert 80 < area_under_parallelism([(1.0, 80.0), (3.0, 76.0)]) < full
    assert area_under_parallelism([(1.0, 80.0), (3.0, 74.9)]) == 80


def test_the_default_is_the_fastest_within_a_point_of_exact_decoding() -> None:
    exact = outcome("exact", 90, 100, 1.0)
    close = outcome("threshold", 89, 300, 1.0)
    bold = outcome("threshold", 88, 500, 1.0)
    assert fastest_within([exact, close, bold]) is close
    assert fastest_within([exact, bold]) is exact


def test_every_curve_begins_with_exact_decoding() -> None:
    found = areas([outcome("exact", 90, 100, 1.0), outcome("factor", 90, 300, 1.0)])
    assert found == {"factor": pytest.approx(90 + 2 * 90)}


def test_every_trial_is_a_decoding_that_a_request_could_ask_for() -> None:
    traits = ModelTraits(block_causal=False, block_length=32, has_auxiliary=True)
    for trial in trials(32):
        assert resolve({}, trial.decoding, {}, traits) == trial.decoding
    assert len({trial.curve for trial in trials(32)}) > 8
