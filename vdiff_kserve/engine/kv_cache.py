"""Memory for keys and values, lent to rows for as long as they run."""

from __future__ import annotations

from functools import cached_property

import psutil
import torch

from vdiff_kserve.models import DecoderConfig, KeyValueStore

CACHE_SHARE_OF_FREE_MEMORY = 0.5
"""What a cache may take of the memory that is free when the engine is built."""


def affordable_tokens(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Canvas tokens whose keys and values fit into the cache's share of the free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    values_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    bytes_per_token = values_per_token * torch.empty((), dtype=dtype).element_size()
    return int(free * CACHE_SHARE_OF_FREE_MEMORY) // bytes_per_token


class KVCache:
    """One piece of memory for `capacity` tokens; each row gets a run of places.

    A request's canvas length is known when it arrives, so its memory is reserved once and never
    grows. The memory itself is taken when the first row needs it.
    """

    def __init__(
        self, config: DecoderConfig, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.capacity = capacity
        self._shape = (config.num_layers, capacity, config.num_kv_heads, config.head_dim)
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
        """Lend the first run of `tokens` places; its offset, or None when none is long enough."""
        for i, (start, size) in enumerate(self._free):
            if size >= tokens:
                self._free[i] = (start + tokens, size - tokens)
                self._lent[start] = tokens
                return start
        return None

    def release(self, offset: int) -> None:
        """Take back the run that starts at `offset`."""
        runs = sorted([*self._free, (offset, self._lent.pop(offset))])
        merged = [runs[0]]
        for start, size in runs[1:]:
            last_start, last_size = merged[-1]
            if last_start + last_size == start:
                merged[-1] = (last_start, last_size + size)
            else:
                merged.append((start, size))
        self._free = [run for run in merged if run[1]]
