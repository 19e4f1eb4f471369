"""What the program does before it imports torch."""

import os
import subprocess
import sys

import pytest

from vdiff_kserve import __main__ as program

IMPORT_TORCH = "from vdiff_kserve.__main__ import let_threads_sleep as f; f(); import torch"


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, str(program.LOOKS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP of GCC")
def test_threads_that_wait_sleep_soon(given: dict[str, str], spins: str) -> None:
    """As OpenMP itself tells when torch loads it."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    told = subprocess.run(
        [sys.executable, "-c", IMPORT_TORCH],
        env={**others, **given, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr
