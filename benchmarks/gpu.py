"""A GPU's roofline and how near the engine comes: `python -m benchmarks.gpu`, in under 8 minutes.

    python -m benchmarks.gpu                         LLaDA-8B's shape, random bfloat16 weights
    python -m benchmarks.gpu --model llada2-mini     LLaDA2.0-mini's: 256 experts, block-causal
    python -m benchmarks.gpu --quantization fp8      linear layers in fp8
    python -m benchmarks.gpu --layers 4 --quick      a few seconds, to see that all of it runs
    python -m benchmarks.gpu --device cpu --layers 2 --width 256 --vocabulary 2304 --quick

Needs torch, transformers, safetensors and accelerate only, no server and no checkpoint. Prints

- the device's own rates: bytes per second of a copy, and operations per second of a large product;
- cached passes ("reuse") of 1, 4, 16 and 64 rows with a block of 32, and whole passes ("refresh")
  of 1,024 to 8,192 tokens: milliseconds, and the roofline's time over the measured one; on a GPU
  also whole passes of 128 and 512 tokens, captured and not;
- on a GPU, attention of the cached passes by itself, by the kernel for few queries and by torch's,
  and the kernels that a pass of one row spends its time in;
- tokens per second of whole answers at 1, 8 and 32 requests at once, two tokens committed per step,
  and milliseconds of a round: its pass, logits, sampler and what the host does.

The roofline's time is the longer of moving every weight and cached key and value once, and of the
matrix products, attention's included, at the measured rates. Passes are queued behind each other,
so that the device is timed and not the host that waits for it. What the memory has no room for, or
fails, is told and left out: the other figures are there all the same.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu_models import (
    add_model_options,
    cache_for,
    config_of,
    random_decoder,
    random_tokens,
    spec_of,
)
from benchmarks.gpu_timing import (
    BLOCK,
    Rates,
    Timing,
    line_of,
    measure_rates,
    roofline,
    seconds_of,
)
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    GenerationRequest,
    measured_token_budget,
)
from vdiff_kserve.models import (
    Decoder,
    ForwardBatch,
    ReuseGraphs,
    RowSpan,
    split_attention,
)
from vdiff_kserve.models.attention import VarlenCall, run_long_kernel, sequences_of
from vdiff_kserve.models.reuse_graphs import CudaRecorder
from vdiff_kserve.sampler import DecodingParams

PROMPT, ANSWER, TOKENS_PER_STEP = 128, 256, 2
CONTEXT = 8192 + BLOCK
REUSE_ROWS = (1, 4, 16, 64)
SHORT_TOKENS = (128, 512)
REFRESH_TOKENS = (1024, 2048, 4096, 8192)
CONCURRENCY = (1, 8, 32)
TARGETS = {"reuse of 1 row": 0.7, "refresh": 0.6}
PROFILED = 3
SHOWN_KERNELS = 14


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add_model_options(parser)
    add("--context", type=int, default=1024, help="cached tokens of each row of a reuse pass")
    add("--enforce_eager", action="store_true", help="without CUDA graphs")
    add("--quick", action="store_true", help="the smallest size of each")
    add("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def reuse_pass(
    decoder: Decoder, rows: int, context: int, graphs: ReuseGraphs | None
) -> Callable[[], torch.Tensor]:
    """A pass over one block of each row, the rest of its canvas in the cache."""
    canvases = [random_tokens(decoder.config, context) for _ in range(rows)]
    block_causal = decoder.config.attention_block is not None
    start = (context - BLOCK if block_causal else context // 2) // BLOCK * BLOCK
    spans = [
        RowSpan(start, BLOCK, context, start, BLOCK, cache_offset=row * context)
        for row in range(rows)
    ]
    store = cache_for(decoder, rows * context)

    def run() -> torch.Tensor:
        states = None if graphs is None else graphs.run(canvases, spans, store)
        if states is None:
            states = decoder(ForwardBatch.pack(canvases, spans, store, decoder.device))
        return states

    return run


def measure_reuse(
    decoder: Decoder, rates: Rates, rows: int, context: int, graphs: ReuseGraphs | None
) -> Timing:
    run = reuse_pass(decoder, rows, context, graphs)
    best = roofline(decoder.config, rates, [BLOCK] * rows, [context] * rows, decoder.dtype.itemsize)
    return Timing(f"reuse, {rows} rows", seconds_of(run, decoder.device), best)


def measure_attention(
    decoder: Decoder, rates: Rates, rows: int, context: int, kernel: str
) -> Timing:
    """Of a cached pass, in one layer. All layers are captured at once, as none finds its keys and
    values in the GPU's own cache."""
    config = decoder.config
    store = cache_for(decoder, rows * context)
    shape = (rows * BLOCK, config.num_heads, config.head_dim)
    query = torch.randn(shape, device=decoder.device).to(decoder.dtype)
    starts = [row * context for row in range(rows)]
    sequences = sequences_of([BLOCK] * rows, starts, [context] * rows)
    bounds = torch.tensor(sequences, dtype=torch.int32).to(decoder.device)
    call = VarlenCall(bounds[0], bounds[1], BLOCK, CONTEXT)

    def run() -> torch.Tensor:
        for key, value in zip(store.keys, store.values, strict=True):
            if kernel == "split":
                assert split_attention.usable(query, key, value, call), "the kernel does not work"
                attended = split_attention.attend(query, key, value, call)
            else:
                attended = run_long_kernel(query, key, value, call, causal=False)
        return attended

    _, replay = CudaRecorder(decoder.device)(run)
    seconds = seconds_of(replay, decoder.device) / config.num_layers
    moved = store.keys[0].nbytes + store.values[0].nbytes
    return Timing(f"attention, {rows} rows, {kernel}", seconds, moved / rates.bandwidth)


def kernels_of_reuse(decoder: Decoder, context: int) -> list[tuple[str, float, float]]:
    """What a pass of one row is made of on a GPU: kernels, how often each runs, and seconds, of all
    its runs together; the longest first."""
    run = reuse_pass(decoder, 1, context, None)
    run()
    torch.cuda.synchronize(decoder.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize(decoder.device)
    seconds: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / PROFILED
            runs[event.name] += 1
    return [(name, runs[name] / PROFILED, time) for name, time in seconds.most_common()]


def measure_refresh(
    decoder: Decoder, rates: Rates, tokens: int, graphs: ReuseGraphs | None = None
) -> Timing:
    """A pass over a whole canvas that keeps its keys and values; one block's states are wanted."""
    canvas = random_tokens(decoder.config, tokens)
    span = RowSpan(0, tokens, tokens, tokens - BLOCK, BLOCK, cache_offset=0)
    store = cache_for(decoder, tokens)

    def run() -> torch.Tensor:
        states = None if graphs is None else graphs.run_whole(canvas, span, store)
        if states is None:
            states = decoder(ForwardBatch.pack([canvas], [span], store, decoder.device))
        return states

    best = roofline(decoder.config, rates, [tokens], [tokens], decoder.dtype.itemsize)
    seconds = seconds_of(run, decoder.device)
    is_captured = graphs is not None and graphs.run_whole(canvas, span, store) is not None
    name = f"refresh, {tokens} tokens" + (", captured" if is_captured else "")
    return Timing(name, seconds, best)


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def measure_generation(
    decoder: Decoder, answer: int, args: argparse.Namespace, failures: list[str]
) -> dict[int, tuple[float, float]]:
    """Tokens per second and seconds of a round by concurrency, each request of its own prompt,
    cache `dual` (`exact` where it is). Everything runs twice: the first time captures passes."""
    vocabulary, spec = decoder.config.vocab_size, spec_of(decoder.config, CONTEXT)
    budget = measured_token_budget(decoder, CONTEXT)
    rng = random.Random(0)
    decoding = DecodingParams(
        steps=answer // TOKENS_PER_STEP,
        block_length=BLOCK,
        cache="exact" if spec.block_causal else "dual",
        logits_eos_inf=True,
    )

    def requests(count: int) -> list[GenerationRequest]:
        prompts = [tuple(rng.choices(range(vocabulary - 2), k=PROMPT)) for _ in range(count)]
        return [GenerationRequest(prompt, answer, decoding) for prompt in prompts]

    def measure(level: int) -> tuple[float, float]:
        config = EngineConfig(
            max_num_seqs=level,
            max_num_batched_tokens=budget,
            kv_cache_tokens=level * (PROMPT + answer),
            enforce_eager=args.enforce_eager,
        )
        with started(Engine(decoder, spec, config)) as engine:
            engine.generate(requests(level))
            began, rounds = time.perf_counter(), engine.num_steps
            results = engine.generate(requests(level))
            seconds, rounds = time.perf_counter() - began, engine.num_steps - rounds
        tokens = sum(result.stats.completion_tokens for result in results)
        return tokens / seconds, seconds / rounds

    measured = {}
    for level in tqdm(CONCURRENCY[: 1 if args.quick else None], desc="Generating", unit="level"):
        with told(f"{level} at once", failures):
            measured[level] = measure(level)
    return measured


@contextmanager
def told(what: str, failures: list[str]) -> Iterator[None]:
    """An error in this measurement is told, and does not lose the others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a measurement raises
        failures.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
        tqdm.write(failures[-1])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def all_that_work(
    measure: Callable[[int], Timing], sizes: Sequence[int], what: str, failures: list[str]
) -> list[Timing]:
    """The timings of all sizes that can be measured, each also told at once."""
    timings = []
    for size in tqdm(sizes, desc=what, unit="size"):
        with told(f"{what} {size}", failures):
            timings.append(measure(size))
            tqdm.write(line_of(timings[-1]))
    return timings


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    began, failures = time.perf_counter(), list[str]()
    if args.quantization and config_of(args).moe is not None:
        raise SystemExit("--quantization is for dense models here: experts keep their weights only")
    rates = measure_rates(device, dtype, args.quick, args.quantization == "fp8")
    decoder = random_decoder(config_of(args), device, dtype, args.quantization)
    graphs = None
    if not args.enforce_eager:
        graphs = ReuseGraphs.for_model(decoder, CONTEXT)
    one = slice(0, 1 if args.quick else None)
    reuse = partial(measure_reuse, decoder, rates, context=args.context, graphs=graphs)
    refresh = partial(measure_refresh, decoder, rates)
    timings = all_that_work(reuse, REUSE_ROWS[one], "Reuse", failures)
    timings += all_that_work(refresh, REFRESH_TOKENS[one], "Refresh", failures)
    captured = graphs is not None and not graphs.failed
    kernels: list[tuple[str, float, float]] = []
    if device.type == "cuda":
        for kept in (graphs, None):
            short = partial(measure_refresh, decoder, rates, graphs=kept)
            timings += all_that_work(short, SHORT_TOKENS[one], "Short refresh", failures)
        for kernel in ("split", "torch"):
            attention = partial(
                measure_attention, decoder, rates, context=args.context, kernel=kernel
            )
            timings += all_that_work(attention, REUSE_ROWS[one], f"Attention by {kernel}", failures)
        with told("Kernels", failures):
            kernels = kernels_of_reuse(decoder, args.context)
    generated: dict[int, tuple[float, float]] = {}
    with told("Answers", failures):
        answer = BLOCK if args.quick else ANSWER
        generated = measure_generation(decoder, answer, args, failures)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "dtype": args.dtype,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "cuda_graphs": captured,
        "bandwidth": rates.bandwidth,
        "matrix_rate": rates.matrix,
        "quantization": args.quantization,
        "linear_rate": rates.linear,
        "passes": [vars(timing) | {"share": timing.share} for timing in timings],
        "kernels": kernels,
        "tokens_per_second": {str(n): rate for n, (rate, _) in generated.items()},
        "round_seconds": {str(n): seconds for n, (_, seconds) in generated.items()},
        "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "seconds": time.perf_counter() - began,
        "failures": failures,
    }
    show(report, timings)
    line = json.dumps(report)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    return report


def show(report: dict[str, Any], timings: Sequence[Timing]) -> None:
    print(
        f"\n{report['device']}, torch {report['torch']}, {report['dtype']}, "
        f"quantization {report['quantization'] or 'none'}, "
        f"{report['parameters']:,} parameters, "
        f"{'with' if report['cuda_graphs'] else 'without'} CUDA graphs\n"
        f"copies {report['bandwidth'] / 1e12:.2f} TB/s, "
        f"products {report['matrix_rate'] / 1e12:.1f} TFLOP/s, "
        f"of linear layers {report['linear_rate'] / 1e12:.1f} TFLOP/s\n"
    )
    print(f"{'pass':<28} {'ms':>9} {'roofline ms':>12} {'share':>7}")
    for timing in timings:
        print(line_of(timing))
    targets = ", ".join(f"{name} {share:.0%}" for name, share in TARGETS.items())
    print(f"targets: {targets}\n\n{'at once':<24} {'tokens/s':>9} {'ms a round':>12}")
    for level, rate in report["tokens_per_second"].items():
        print(f"{level:<24} {rate:9.1f} {report['round_seconds'][level] * 1e3:12.2f}")
    if report["kernels"]:
        total = sum(seconds for *_, seconds in report["kernels"])
        runs = sum(count for _, count, _ in report["kernels"])
        print(f"\nreuse of 1 row: {runs:.0f} kernels, {total * 1e3:.2f} ms, of which")
    for name, count, seconds in report["kernels"][:SHOWN_KERNELS]:
        print(f"{seconds * 1e3:9.3f} ms {count:6.0f} x {name[:80]}")
    for failure in report["failures"]:
        print(f"failed: {failure}")


if __name__ == "__main__":
    main()
