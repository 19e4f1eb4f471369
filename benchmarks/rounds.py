"""Where a round spends its time, and which share of the matrix rate it could reach.

    python -m benchmarks.rounds                         the embedded model, 16 rows
    python -m benchmarks.rounds --random 12x512x8192    a random checkpoint

The bare engine answers the load of `benchmarks.serving` on the CPU. Parts of a layer are timed by
a clock around them, which adds a few microseconds to each.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from benchmarks import serving
from benchmarks.serving_engine import BareEngine
from benchmarks.serving_machine import (
    attention_flops,
    best_layer_rate,
    matrix_rates,
    on_a_passing_thread,
    round_flops,
)
from benchmarks.serving_server import Rounds
from vdiff_kserve.engine import Engine, RoundReport
from vdiff_kserve.models import Decoder, cpu_kernels, decoder, packed_linear
from vdiff_kserve.models.cpu_pass import CpuPass
from vdiff_kserve.models.decoder import Attention
from vdiff_kserve.models.layers import RMSNorm
from vdiff_kserve.models.packed_linear import PackedLinear
from vdiff_kserve.models.panel_linear import PanelLinear

LINEAR, ATTENTION, LOGITS = "linear layers", "attention", "logits"
LAYERS = "layers, attention included"
PARTS: Mapping[str, Sequence[tuple[Any, str]]] = {
    LINEAR: [
        *((PackedLinear, name) for name in ("forward", "silu", "multiplied")),
        (PanelLinear, "forward"),
        (packed_linear, "gated"),
    ],
    LAYERS: [(CpuPass, "advance")],
    ATTENTION: [(cpu_kernels, "attend"), (decoder, "attend")],
    "norms, residual sums": [(RMSNorm, "forward"), (RMSNorm, "of_sum")],
    "rotary embedding": [(decoder, "rotary_angles"), (decoder, "rotate")],
    "cache writes": [(Attention, "_keep")],
    LOGITS: [(Decoder, "logits")],
}
"""Part of a round -> where it is computed."""


class Clock:
    """Times parts that are called by name; a part inside of another belongs to the outer one.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._is_inside = False

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **named)
            self._is_inside, began = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self._is_inside = False

        return timed


def run(bare: BareEngine, benchmark: serving.Benchmark, rows: int) -> tuple[Rounds, Clock]:
    """Answer the load with at most `rows` at once."""
    reports: list[RoundReport] = []
    prompts, clock = benchmark.prompts(rows), Clock()
    engine = bare.start(rows, len(prompts), Engine, reports.append)
    bare.warm_up(engine, benchmark.warm_up_prompts)
    reports.clear()
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                timed = clock.around(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
        results = engine.generate([bare.request(prompt) for prompt in prompts])
    engine.stop()
    steps = sum(report.rows for report in reports)
    phases = ("plan", "forward", "sample", "apply")
    return Rounds(
        count=len(reports),
        rows=steps,
        passes=steps,
        computed=sum(report.computed for report in reports),
        cached=sum(report.cached for report in reports),
        attended=sum(report.attended for report in reports),
        committed=sum(report.committed for report in reports),
        generated=sum(result.stats.completion_tokens for result in results),
        seconds={p: sum(getattr(report, f"{p}_seconds") for report in reports) for p in phases},
    ), clock


def show(
    benchmark: serving.Benchmark, rounds: Rounds, clock: Clock, rate: float, budget: int
) -> None:
    """Print the parts, and what they come to."""
    spec, seconds = benchmark.spec, dict(clock.seconds)
    in_pass = sum(seconds.values()) - seconds[LOGITS]
    seconds["rest of the pass"] = rounds.seconds["forward"] - in_pass
    seconds["candidates, choice"] = rounds.seconds["sample"] - seconds[LOGITS]
    seconds["plan, apply"] = rounds.seconds["plan"] + rounds.seconds["apply"]
    flops = round_flops(spec.decoder, spec.block_length, rounds)
    attention = attention_flops(spec.decoder, spec.block_length, rounds)
    print(f"\nwhole passes take at most {budget} tokens of a round")
    print(f"{rounds.rows / rounds.count:.1f} rows per round | ms | share of the round")
    for part, taken in seconds.items():
        share = taken / rounds.total_seconds
        print(f"{part} | {taken / rounds.count * 1e3:.2f} | {share:.1%}")
    print(f"round | {rounds.mean_seconds * 1e3:.2f} | 100%")
    with_products = sum(seconds.get(part, 0) for part in (LAYERS, LINEAR, ATTENTION, LOGITS))
    best, best_with_attention = flops / rate, (flops + attention) / rate
    print(f"matrix rate: {rate / 1e9:.0f} GFLOP/s")
    print(f"share of the matrix rate: {best / rounds.total_seconds:.1%}")
    print(f"with attention: {best_with_attention / rounds.total_seconds:.1%}")
    print(f"share if only layers, attention and logits took time: {best / with_products:.1%}")
    print(f"share if they also ran at the matrix rate: {best / best_with_attention:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--random", metavar="LxWxV", help="layers, width and vocabulary")
    parser.add_argument("--rows", type=int, default=16, help="at once (16)")
    parser.add_argument("--requests", type=int, default=48, help="to answer (48)")
    given = parser.parse_args()
    options = ["--dtype", "bfloat16", "--device", "cpu"]
    options += ["--concurrency", str(given.rows), "--requests", str(given.requests)]
    if given.random:
        options += ["--random", given.random]
    with serving.opened(serving.parse_arguments(options)) as benchmark:
        config, device, dtype = benchmark.spec.decoder, benchmark.device, benchmark.dtype
        bare = benchmark.bare_engine({"policy": "threshold", "cache": "dual"}, None)
        rate = on_a_passing_thread(lambda: best_layer_rate(matrix_rates(config, device, dtype)))
        show(benchmark, *run(bare, benchmark, given.rows), rate, bare.token_budget)


if __name__ == "__main__":
    main()
