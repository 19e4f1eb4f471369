"""The benchmark of the server's overhead starts a server, or says why it could not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overhead import server


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"did not start:\n(?s:.*)config\.json"), server(tmp_path):
        pass
