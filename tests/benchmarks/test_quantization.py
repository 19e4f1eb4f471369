"""The comparison of weights in fewer bits runs and tells every kind."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest

from benchmarks import quality, quantization


@pytest.mark.slow
def test_every_kind_has_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--n", "4", "--max_tokens", "32", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["quantization", *options])
    quantization.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows.keys() == {"none", "int8", "fp8", "int4"}
    for kind in ("int8", "fp8"):
        assert rows[kind]["weight_bytes"] < 0.6 * rows["none"]["weight_bytes"]
    assert all(row["tokens_per_s"] > 0 for row in rows.values())


def test_the_rate_leaves_loading_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which loading a model takes an hour."""
    hours, load = [0.0], quality.load_decoder

    def slow_load(*given: Any, **more: Any) -> Any:
        hours.append(3600.0)
        return load(*given, **more)

    monkeypatch.setattr(quality, "load_decoder", slow_load)
    monkeypatch.setattr(quantization.time, "monotonic", lambda: time.perf_counter() + sum(hours))
    monkeypatch.setattr(quantization, "QUANTIZATIONS", ())
    monkeypatch.setattr(sys, "argv", ["quantization", "--n", "1", "--max_tokens", "32"])
    quantization.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"].values()
    assert row["tokens_per_s"] > 32 / 3600
