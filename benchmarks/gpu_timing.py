"""Clocks for a GPU, and what its roofline says of a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vdiff_kserve.models import DecoderConfig

BLOCK = 32
"""Tokens of a cached pass of one row."""
MEASURE_S = 1.0
QUEUED = 8
"""Runs between two looks at the clock: the host's wait for the device is spread over them."""
COPIED_BYTES = 1 << 30
SQUARE = 8192


@dataclass(frozen=True)
class Rates:
    """What the device does at best.

    Attributes:
        bandwidth: bytes per second, read and written.
        matrix: operations per second of a product in the model's number type.
    """

    bandwidth: float
    matrix: float


@dataclass(frozen=True)
class Timing:
    """One kind of pass.

    Attributes:
        best: the roofline's seconds.
    """

    name: str
    seconds: float
    best: float

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.best / self.seconds


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The median of the runs that fit in `MEASURE_S`, three at least, after two that do not count.
    On a GPU a run is one of `QUEUED` that follow each other without the host."""
    count = QUEUED if device.type == "cuda" else 1

    def once() -> float:
        started = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    once(), once()
    began, times = time.perf_counter(), []
    while len(times) < 3 or time.perf_counter() - began < MEASURE_S:
        times.append(once())
    return sorted(times)[len(times) // 2]


def measure_rates(device: torch.device, dtype: torch.dtype, quick: bool) -> Rates:
    source = torch.empty(COPIED_BYTES >> (4 if quick else 0), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device)
    side = SQUARE >> (3 if quick else 0)
    square = torch.randn(side, side, device=device).to(dtype)
    product = seconds_of(lambda: square @ square, device)
    return Rates(2 * len(source) / copy, 2 * side**3 / product)


def roofline(
    config: DecoderConfig, rates: Rates, queries: Sequence[int], keys: Sequence[int], itemsize: int
) -> float:
    """Least seconds of a pass without logits, for rows of so many queries and keys. Of the last
    layer only keys and values, and one block of each row, are computed."""
    width, kept = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    key_value = config.hidden_size * kept
    rest = config.hidden_size * (2 * width + 3 * config.intermediate_size)
    layers, tokens, wanted = config.num_layers, sum(queries), BLOCK * len(queries)
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    last_pairs = sum(BLOCK * k for k in keys)
    moved = itemsize * layers * (key_value + rest + kept * sum(keys))
    products = layers * key_value * tokens + rest * ((layers - 1) * tokens + wanted)
    attention = 2 * width * ((layers - 1) * pairs + last_pairs)
    return max(moved / rates.bandwidth, 2 * (products + attention) / rates.matrix)


def line_of(timing: Timing) -> str:
    return (
        f"{timing.name:<32} {timing.seconds * 1e3:9.3f} {timing.best * 1e3:12.3f} "
        f"{timing.share:7.1%}"
    )
