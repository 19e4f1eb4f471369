"""Memory for keys and values, lent to rows for as long as they run."""

from __future__ import annotations

from functools import cached_property

import torch

from vdiff_kserve.models import DecoderConfig, KeyValueStore, free_host_memory

LEAST_SCRATCH = 1 << 30
"""GPU memory that a round may always take beside weights and caches."""


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Memory of one canvas token's keys and values in all layers."""
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return values * dtype.itemsize


def memory_for_cache(
    device: torch.device,
    gpu_memory_utilization: float,
    cpu_memory_utilization: float,
    scratch_bytes: int,
) -> int:
    """Bytes that a cache may take once the weights are loaded.

    Args:
        gpu_memory_utilization: share of a GPU's memory that the process may use in all.
        cpu_memory_utilization: share of the free host memory that the cache may take.
        scratch_bytes: what a round needs beside it on a GPU.
    """
    if device.type != "cuda":
        return int(free_host_memory() * cpu_memory_utilization)
    torch.cuda.empty_cache()  # of what loading and trial passes have left
    free, total = torch.cuda.mem_get_info(device)
    left = int(total * gpu_memory_utilization) - (total - free)
    return max(0, without_scratch(left, scratch_bytes))


def without_scratch(left: int, scratch_bytes: int) -> int:
    """What caches may take of `left` bytes. Scratch gets half at most, or LEAST_SCRATCH: a model of
    a long context runs where only shorter requests fit."""
    return left - min(scratch_bytes, max(LEAST_SCRATCH, left // 2))


class KVCache:
    """One piece of memory for `capacity` tokens; each row gets a run of places.

    A request's canvas length is known when it arrives, so its memory is reserved once and never
    grows. The memory itself is taken when the first row needs it; it has one place more, which is
    lent to nobody: what a captured pass computes beside its rows goes there.
    """

    def __init__(
        self, config: DecoderConfig, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.capacity = capacity
        self._shape = (config.num_layers, capacity + 1, config.num_kv_heads, config.head_dim)
        self._device = device
        self._dtype = dtype
        self._free = [(0, capacity)]
        self._lent: dict[int, int] = {}

    @cached_property
    def store(self) -> KeyValueStore:
        """The memory itself."""
        keys, values = (
            torch.zeros(self._shape, device=self._device, dtype=self._dtype) for _ in range(2)
        )
        return KeyValueStore(keys, values)

    @property
    def used(self) -> int:
        """Tokens that are lent out."""
        return sum(self._lent.values())

    def reserve(self, tokens: int) -> int | None:
        """Lend `tokens` places of the shortest free run that has them; its offset, or None when
        none is long enough."""
        fitting = [(size, start) for start, size in self._free if size >= tokens]
        if not fitting:
            return None
        size, start = min(fitting)
        self._free[self._free.index((start, size))] = (start + tokens, size - tokens)
        self._lent[start] = tokens
        return start

    def shrink(self, offset: int, tokens: int) -> None:
        """Take back all but the first `tokens` places of the run that starts at `offset`."""
        size = self._lent[offset]
        self._lent[offset] = tokens
        self._take_back(offset + tokens, size - tokens)

    def release(self, offset: int) -> None:
        """Take back the run that starts at `offset`."""
        self._take_back(offset, self._lent.pop(offset))

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of `tokens` places from one run to another."""
        for stored in (self.store.keys, self.store.values):
            stored[:, target : target + tokens] = stored[:, source : source + tokens]

    def _take_back(self, offset: int, tokens: int) -> None:
        runs = sorted([*self._free, (offset, tokens)])
        merged = [runs[0]]
        for start, size in runs[1:]:
            last_start, last_size = merged[-1]
            if last_start + last_size == start:
                merged[-1] = (last_start, last_size + size)
            else:
                merged.append((start, size))
        self._free = [run for run in merged if run[1]]
