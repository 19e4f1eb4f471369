"""The benchmark that tells where a round's time goes."""

import sys

import pytest

from benchmarks import rounds
from vdiff_kserve.models.layers import RMSNorm


def test_a_part_inside_of_another_is_the_outer_ones() -> None:
    clock = rounds.Clock()
    inner = clock.around("inner", lambda: None)

    def fail() -> None:
        inner()
        raise ValueError

    outer = clock.around("outer", fail)
    with pytest.raises(ValueError):  # noqa: PT011  any
        outer()
    assert set(clock.seconds) == {"outer"}
    inner()
    assert set(clock.seconds) == {"outer", "inner"}


@pytest.mark.slow
def test_it_prints_the_parts_of_a_round_and_leaves_no_clock_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rounds", "--rows", "2", "--requests", "2"])
    before = RMSNorm.forward
    rounds.main()
    assert RMSNorm.forward is before
    told = capsys.readouterr().out
    lines = [line.split(" | ") for line in told.splitlines() if line.endswith("%") and "|" in line]
    shares = {part: float(share.rstrip("%")) for part, _, share in lines}
    assert {rounds.LOGITS, "rest of the pass", "candidates, choice", "plan, apply"} < set(shares)
    assert sum(shares.values()) - shares["round"] == pytest.approx(100, abs=1)
