"""Command that compiles the kernels into a folder; by default beside their sources."""

from __future__ import annotations

import sys
from pathlib import Path

from vdiff_kserve.cpu_library import FAILURES, FOLDER, compile_into


def main() -> int:
    """Compile into the folder that the command line names. Returns the process's exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else FOLDER
    try:
        sys.stdout.write(f"{compile_into(folder)}\n")
    except FAILURES as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
