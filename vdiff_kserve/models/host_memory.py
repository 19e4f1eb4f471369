"""Free memory of the host, or of the container that the process may not grow beyond."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 of the kernel's control groups and of version 1: limit, use, and the entry of
`memory.stat` with what would be given back first."""


def free_host_memory(cgroups: Path = CGROUPS) -> int:
    """Bytes that the process may still take: of the host, or of its container if that has less.

    Args:
        cgroups: where the container's limits are shown.
    """
    free = int(psutil.virtual_memory().available)
    for limit, use, reclaimable in FILES:
        left = _left(cgroups / limit, cgroups / use, reclaimable)
        if left is not None:
            free = min(free, left)
    return free


def _left(limit: Path, use: Path, reclaimable: str) -> int | None:
    """What is left of a limit, as Kubernetes counts: pages of files not used lately are free; None
    without a limit."""
    try:
        most = int(limit.read_text(encoding="ascii"))
        used = int(use.read_text(encoding="ascii"))
        lines = (limit.parent / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next(int(n) for name, n in map(str.split, lines) if name == reclaimable)
    except (OSError, ValueError, StopIteration):  # "max" is no number
        return None
    return max(0, most - (used - cached))
