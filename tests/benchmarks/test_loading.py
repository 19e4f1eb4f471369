"""The loading benchmark loads what it wrote."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import loading


@pytest.mark.slow
def test_both_rates_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gigabytes", "0.1", "--repeat", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["loading", *options])
    loading.main()
    told = re.search(r"alone ([\d.]+) GB/s, loaded ([\d.]+) GB/s", capsys.readouterr().out)
    assert told
    assert float(told[1]) >= float(told[2]) > 0
