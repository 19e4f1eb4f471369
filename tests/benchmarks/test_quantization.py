"""The comparison of weights in fewer bits runs and tells every kind."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import quantization


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
