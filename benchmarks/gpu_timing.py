"""Clocks for a GPU, and what its roofline says of a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vdiff_kserve.models import DecoderConfig, fp8

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
        linear: the same of the blocks' linear layers, which may be in fp8.
        weight: bytes of one of their weights.
    """

    bandwidth: float
    matrix: float
    linear: float
    weight: int


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


def measure_rates(
    device: torch.device, dtype: torch.dtype, quick: bool, in_fp8: bool = False
) -> Rates:
    source = torch.empty(COPIED_BYTES >> (4 if quick else 0), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device)
    side = SQUARE >> (3 if quick else 0)
    square = torch.randn(side, side, device=device).to(dtype)
    product = seconds_of(lambda: square @ square, device)
    bandwidth, matrix = 2 * len(source) / copy, 2 * side**3 / product
    if not in_fp8:
        return Rates(bandwidth, matrix, matrix, dtype.itemsize)
    rounded = fp8.round_rows(square)
    scales = rounded.scales.flatten()
    product = seconds_of(lambda: fp8.multiply(rounded, rounded.values, scales, None), device)
    return Rates(bandwidth, matrix, 2 * side**3 / product, 1)


def roofline(
    config: DecoderConfig, rates: Rates, queries: Sequence[int], keys: Sequence[int], itemsize: int
) -> float:
    """Least seconds of a pass without logits, for rows of so many queries and keys. Of the last
    layer only keys and values, and one block of each row, are computed. Tokens choose experts
    evenly, and no query of a block-causal model sees a later block."""
    width, kept = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    key_value = config.hidden_size * kept
    tokens, wanted = sum(queries), BLOCK * len(queries)
    pairs, last_pairs = _pairs(config, queries, keys), sum(BLOCK * k for k in keys)
    cached, weights, products = 0.0, 0.0, 0.0
    for layer in range(config.num_layers):
        computed = tokens if layer < config.num_layers - 1 else wanted
        read, multiplied = _mlp(config, layer, computed)
        weights += key_value + 2 * config.hidden_size * width + read
        cached += kept * sum(keys)
        products += key_value * tokens + computed * (2 * config.hidden_size * width + multiplied)
    attention = 2 * width * ((config.num_layers - 1) * pairs + last_pairs)
    moved = rates.weight * weights + itemsize * cached
    computed_s = 2 * products / rates.linear + 2 * attention / rates.matrix
    return max(moved / rates.bandwidth, computed_s)


def _pairs(config: DecoderConfig, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Of a query and a key that it sees."""
    hidden = sum(q * (q - BLOCK) / 2 for q in queries) if config.attention_block else 0
    return sum(q * k for q, k in zip(queries, keys, strict=True)) - hidden


def _mlp(config: DecoderConfig, layer: int, tokens: int) -> tuple[float, float]:
    """Weights of a layer's MLP or experts that are read for so many tokens, and products of one."""
    experts = config.moe
    if experts is None or layer in config.dense_layers:
        weights = 3 * config.hidden_size * config.intermediate_size
        return weights, weights
    one, number = 3 * config.hidden_size * experts.expert_size, experts.num_experts
    always = config.hidden_size * (number + 3 * experts.shared_size)
    chosen = number * (1 - (1 - experts.experts_per_token / number) ** tokens)
    return always + one * chosen, always + one * experts.experts_per_token


def line_of(timing: Timing) -> str:
    return (
        f"{timing.name:<32} {timing.seconds * 1e3:9.3f} {timing.best * 1e3:12.3f} "
        f"{timing.share:7.1%}"
    )
