"""Processors of the host: how many this process may use, and threads to match."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vdiff_kserve.models.host_memory import CGROUPS

THREADS_VARIABLE = "OMP_NUM_THREADS"


def usable_processors(cgroups: Path = CGROUPS) -> int:
    """Processors that this process may keep busy, at least one: those that it may run on, or what
    its container's limit comes to, rounded up, if that is less.

    Args:
        cgroups: where the container's limits are shown.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _limit(cgroups)
    return most if limit is None else max(1, min(most, math.ceil(limit)))


def fit_threads(
    environment: Mapping[str, str] = os.environ, cgroups: Path = CGROUPS, processes: int = 1
) -> None:
    """Let torch compute with no more threads than there are processors for them.

    torch counts the machine's processors. In a container that may use four of sixty-four, threads
    that wait for each other would use up its time. A number that the environment sets stands for
    the processors.

    Args:
        processes: that compute at the same time and share the processors.
    """
    threads = torch.get_num_threads()
    processors = threads if THREADS_VARIABLE in environment else usable_processors(cgroups)
    share = max(1, processors // processes)
    if share < threads:
        torch.set_num_threads(share)


def _limit(cgroups: Path) -> float | None:
    """Processors that the kernel grants the container, by either version of control groups."""
    try:
        file = cgroups / "cpu.max"
        if file.exists():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
                for name in ("quota", "period")
            )
        granted = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return granted if granted > 0 else None
