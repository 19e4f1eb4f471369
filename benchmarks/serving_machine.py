"""How fast this machine multiplies matrices, and how much of that a model's rounds ask for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.serving_server import Rounds
from vdiff_kserve.models import DecoderConfig, can_pack
from vdiff_kserve.models.packed_linear import PackedLinear, packed

ROWS = {"cpu": (32, 128, 512, 1024), "cuda": (32, 256, 1024, 4096)}
SQUARE = {"cpu": 2048, "cuda": 8192}
QUEUED = 8
"""Runs between two looks at the clock on a GPU, which spread the host's wait for it."""
MEASURE_S = 0.4

T = TypeVar("T")


def round_flops(config: DecoderConfig, block: int, rounds: Rounds) -> float:
    """Floating-point operations of the matrix products in some rounds.

    Counted are the linear layers, two operations per parameter and token, and the logits. The last
    layer computes keys and values for every token, the rest only for the active block. Logits are
    computed for open positions, of which a block has on average (block + tokens per step) / 2.
    Attention is counted apart, by `attention_flops`.

    Args:
        block: block length of the requests.
    """
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    key_value = 2 * config.hidden_size * keys
    layer = (
        2 * config.hidden_size * queries
        + key_value
        + 3 * config.hidden_size * config.intermediate_size
    )
    outputs = min(rounds.computed, rounds.passes * block)
    parameters_times_tokens = (
        (config.num_layers - 1) * layer * rounds.computed
        + key_value * rounds.computed
        + (layer - key_value) * outputs
    )
    per_step = rounds.committed / rounds.passes if rounds.passes else 0.0
    logits = rounds.passes * (block + per_step) / 2 * config.hidden_size * config.vocab_size
    return 2 * (parameters_times_tokens + logits)


def attention_flops(config: DecoderConfig, block: int, rounds: Rounds) -> float:
    """Floating-point operations of attention's two products in some rounds: four per pair of query
    and key and element of the heads. In the last layer only the active block's queries count."""
    seen = rounds.computed + rounds.cached
    pairs = (config.num_layers - 1) * rounds.attended + min(rounds.attended, block * seen)
    return 4 * config.num_heads * config.head_dim * pairs


def on_a_passing_thread(call: Callable[[], T]) -> T:
    """What `call` returns, run on a thread that ends, as the server loads its model: the OpenMP
    threads of one that stays would make those of an engine sleep between operations."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(call).result()


@torch.inference_mode()
def matrix_rates(
    config: DecoderConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Operations per second of matrix products, by what is multiplied.

    One entry per number of tokens, for the matrices of one of the model's layers, and `square` for
    one large square product. On a CPU it is the better of the server's products and oneDNN's.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = nn.ModuleList(
        nn.Linear(i, o, bias=False, device=device, dtype=dtype)
        for i, o in ((hidden, hidden), (hidden, inner), (inner, hidden))
    )
    ways = [layer]
    if can_pack(device, dtype):
        ways = [nn.ModuleList(map(pack, layer)) for pack in (packed, PackedLinear)]
    parameters = hidden * hidden + 2 * hidden * inner

    def seconds(tokens: int) -> float:
        x = _random(tokens, hidden, device, dtype)
        return min(_seconds(partial(_through, way, x)) for way in ways)

    rates = {f"{n} tokens": 2 * n * parameters / seconds(n) for n in ROWS[device.type]}
    side = SQUARE[device.type]
    square = _random(side, side, device, dtype)
    rates["square"] = 2 * side**3 / _seconds(lambda: square @ square)
    return rates


def best_layer_rate(rates: dict[str, float]) -> float:
    """The highest rate at the model's own shapes."""
    return max(rate for name, rate in rates.items() if name != "square")


def _through(layer: nn.ModuleList, x: Tensor) -> Tensor:
    for linear in layer:
        x = linear(x)
    return x


def _random(n: int, m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, m, device=device).to(dtype)


def _seconds(run: Callable[[], Tensor]) -> float:
    """The shortest time of a run, of those that fit in `MEASURE_S`. On a GPU a run is one of
    `QUEUED` that follow each other without the host."""
    on_gpu = run().is_cuda
    count = QUEUED if on_gpu else 1
    if on_gpu:
        torch.cuda.synchronize()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MEASURE_S:
        start = time.perf_counter()
        for _ in range(count):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / count)
    return best
