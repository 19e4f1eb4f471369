"""Memory of the host: what is free, and what this process keeps of what it has used."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 of the kernel's control groups and of version 1: limit, use, and the entry of
`memory.stat` with what would be given back first."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

KEPT_BYTES = 256 << 20
LARGEST_KEPT = 32 << 20
"""Of one allocation; the most that glibc takes."""

ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many kernels oneDNN keeps, and each thread of torch beside it: 1,024 unless they say so."""

KEPT_KERNELS = 256
"""Enough for the sizes of passes that come back again and again."""


def bound_kernel_caches(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let a process keep fewer of the kernels that oneDNN makes for each size of matrices.

    Every number of tokens is a size of its own, and a kernel takes over half a megabyte, so that
    a server on a CPU would grow for hours. It must be called before the first product: the
    environment is read once. Variables that are set are left alone.
    """
    for name in KERNEL_CACHES:
        environment.setdefault(name, str(KEPT_KERNELS))


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep freed memory of this process for its next allocations; False when it does not.

    Every layer of a forward pass takes and frees the same few megabytes. As it stands, glibc gives
    them back to the kernel each time when the thread is not the program's first, and the kernel
    clears every page anew: up to a quarter of the processors' time. An environment that sets how
    glibc allocates is left alone, and so is every other C library.
    """
    if any(name in environment for name in ALLOCATOR_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT))


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
