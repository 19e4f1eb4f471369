"""Serving under load: `python -m benchmarks.serving`, a closed loop over real HTTP.

    python -m benchmarks.serving                                the embedded model
    python -m benchmarks.serving --random 12x512x8192           a random checkpoint of that size
    python -m benchmarks.serving --compare                      beside two baselines
    python -m benchmarks.serving --scenario short_among_long
    python -m benchmarks.serving --scenario long_prompt --random 12x512x8192

Starts a server process on a free port (or takes `--base_url`) and keeps 1, 2, 4, 8, 16 and 32
requests in flight. Answers are streamed and have their full length (`ignore_eos`). Prints tables
and, last, one line of JSON. `benchmarks/README.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import serving_report
from benchmarks.load import Client, Load, Prompt, closed_loop, workload
from benchmarks.serving_checkpoint import (
    CONTEXT,
    parse_sizes,
    read_checkpoint,
    write_random_checkpoint,
)
from benchmarks.serving_compare import compare, requests_to_compare
from benchmarks.serving_engine import BareEngine, decoding_of, long_prompt
from benchmarks.serving_machine import (
    attention_flops,
    best_layer_rate,
    matrix_rates,
    on_a_passing_thread,
    round_flops,
)
from benchmarks.serving_scenarios import short_among_long
from benchmarks.serving_server import Rounds, Server, model_name, scrape_at_rest
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.models import ModelSpec, choose_device, choose_dtype

SCENARIOS = ("load", "short_among_long", "long_prompt")
WARM_UP = 4
COMPARED = 16
LONG_ROWS = 15
RUNNING_ROWS = 8
LONG_PROMPT = 2000
AT_ONCE = {"threshold": 1e-6}
"""Decoding that commits a block in one step."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a random checkpoint is served in bfloat16 unless it says otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--model_dir", type=Path, default=EMBEDDED)
    model.add_argument("--random", metavar="LxWxV", help="layers, width and vocabulary")
    parser.add_argument("--context", type=int, help=f"of a random model ({CONTEXT})")
    add = parser.add_argument_group("server").add_argument
    add("--base_url", help="a server that runs already and has the same model")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--server_args", default="", metavar="'--FLAG ...'", help="further flags of the server")
    add = parser.add_argument_group("load").add_argument
    add("--scenario", choices=SCENARIOS, default="load")
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N")
    add(
        "--requests", type=int, nargs="+", default=[64], metavar="N",
        help="of every level, or a number for each; they are the first of one list",
    )  # fmt: skip
    add("--prompt_tokens", type=int, nargs=2, default=(16, 512), metavar=("LOW", "HIGH"))
    add("--new_tokens", type=int, nargs=2, default=(64, 256), metavar=("LOW", "HIGH"))
    add("--cache", default="dual")
    add("--threshold", type=float, help="commit every token this likely")
    add("--block_length", type=int)
    add("--fields", type=json.loads, default={}, metavar="JSON", help="further request fields")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--probes", type=int, help="short requests, or long prompts, of a scenario")
    add(
        "--compare", type=int, nargs="*", metavar="N",
        help="also one after the other and without a server, at these levels (16)",
    )  # fmt: skip
    add("--turns", type=int, default=2, help="how often the compared ways take turns")
    add("--engine_only", action="store_true", help="compare with the bare engine's rate alone")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    if args.random and args.dtype == "auto":
        args.dtype = "bfloat16"
    if args.compare == []:
        args.compare = [COMPARED if COMPARED in args.concurrency else max(args.concurrency)]
    if args.compare and not set(args.compare) <= set(args.concurrency):
        parser.error("--compare takes levels of --concurrency")
    if len(args.requests) not in (1, len(args.concurrency)):
        parser.error("--requests takes one number, or one for each level of --concurrency")
    if args.context and not args.random:
        parser.error(
            "--context is for a random model; --server_args '--max_model_len N' for others"
        )
    if args.turns < 1:
        parser.error("--turns takes a number from 1")
    if args.scenario == "long_prompt" and args.base_url:
        parser.error("--scenario long_prompt watches an engine of its own; leave --base_url out")
    return args


@dataclass(frozen=True)
class Level:
    """One level of concurrency: what the client saw and what the server did meanwhile."""

    load: Load
    rounds: Rounds

    def summary(self, spec: ModelSpec, peak: float) -> dict[str, Any]:
        """The figures as JSON."""
        rounds, load = self.rounds, self.load
        decoding = load.whole[0].decoding if load.whole else {}
        block = decoding.get("block_length", spec.block_length)
        flops = round_flops(spec.decoder, block, rounds)
        attention = attention_flops(spec.decoder, block, rounds)
        in_rounds = rounds.total_seconds
        return load.summary() | {
            "server_tokens": rounds.generated,
            "rounds": rounds.count,
            "rows_per_round": rounds.rows / rounds.count if rounds.count else 0.0,
            "round_seconds": rounds.mean_seconds,
            "phase_seconds": rounds.seconds,
            "bookkeeping": rounds.bookkeeping,
            "computed_tokens": rounds.computed,
            "cached_tokens": rounds.cached,
            "gflops_in_rounds": flops / in_rounds / 1e9 if in_rounds else 0.0,
            "share_of_matrix_rate": flops / in_rounds / peak if in_rounds else 0.0,
            "share_with_attention": (flops + attention) / in_rounds / peak if in_rounds else 0.0,
            "share_of_matrix_rate_by_the_clock": flops / load.seconds / peak,
        }


class Benchmark:
    """A checkpoint, the prompts made for it, and the ways to ask them.

    Args:
        folder: the checkpoint that is, or will be, served.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.spec, self._token_ids = read_checkpoint(folder)
        self.device = choose_device(args.device)
        self.dtype = choose_dtype(args.dtype, self.device)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What every request says of its decoding."""
        given = {"threshold": self.args.threshold, "block_length": self.args.block_length}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {"cache": self.args.cache, **chosen, **self.args.fields}

    @cached_property
    def _prompts(self) -> list[Prompt]:
        """The requests of the longest level, and some more to warm up with at the end."""
        args = self.args
        count = max(args.requests) + WARM_UP
        return self.mixed(count, tuple(args.prompt_tokens), tuple(args.new_tokens))

    @property
    def warm_up_prompts(self) -> list[Prompt]:
        """What is asked before anything counts."""
        return self._prompts[-WARM_UP:]

    def prompts(self, concurrency: int) -> list[Prompt]:
        """The requests of a level."""
        levels, counts = self.args.concurrency, self.args.requests
        counts = counts * len(levels) if len(counts) == 1 else counts
        return self._prompts[: counts[levels.index(concurrency)]]

    def exactly(self, count: int, prompt_tokens: int, new_tokens: int) -> list[Prompt]:
        """Prompts of one length."""
        return self.mixed(count, (prompt_tokens,) * 2, (new_tokens,) * 2)

    def mixed(self, count: int, prompt: tuple[int, int], new: tuple[int, int]) -> list[Prompt]:
        """Prompts of lengths between bounds."""
        context = self.spec.max_model_len
        return workload(count, self.args.seed, self._token_ids, prompt, new, context)

    def server(self, rows: int) -> Server:
        """A server of the checkpoint for `rows` requests at once."""
        return Server(
            self.folder,
            *("--max_num_seqs", str(rows), "--dtype", self.args.dtype),
            *("--device", self.args.device, *shlex.split(self.args.server_args)),
        )

    def client(self, url: str, fields: dict[str, Any] | None = None) -> Client:
        """Asks with the decoding of this benchmark."""
        return Client(url, model_name(url), self.fields if fields is None else fields)

    def bare_engine(self, report: dict[str, Any], token_budget: int | None) -> BareEngine:
        """The engine in this process, decoding as an answer of the server reports it."""
        decoding = decoding_of(report)
        return BareEngine.load(self.folder, self.device, self.dtype, decoding, token_budget)

    def level(self, url: str, concurrency: int, on_answer: Callable[[], object]) -> Level:
        """Ask all prompts with `concurrency` in flight."""
        client, prompts = self.client(url), self.prompts(concurrency)
        before = scrape_at_rest(url)
        load = asyncio.run(closed_loop(client, prompts, concurrency, on_answer))
        return Level(load, Rounds.between(before, scrape_at_rest(url)))

    def warm_up(self, url: str) -> dict[str, Any]:
        """Ask a few prompts that do not count; returns how they were decoded. On a GPU the first
        also goes alone: passes over whole canvases of one row are captured when they come again.

        Raises:
            SystemExit: the server refuses them.
        """
        prompts = self.warm_up_prompts
        if self.device.type == "cuda":
            asyncio.run(closed_loop(self.client(url), prompts[:1], 1))
        load = asyncio.run(closed_loop(self.client(url), prompts, len(prompts)))
        if load.errors:
            raise SystemExit(f"The server refuses the load: {next(iter(load.errors))}")
        return load.whole[0].decoding


def run_load(benchmark: Benchmark) -> dict[str, Any]:
    """Every level, and what they are compared with."""
    args = benchmark.args
    rates = on_a_passing_thread(
        lambda: matrix_rates(benchmark.spec.decoder, benchmark.device, benchmark.dtype)
    )
    peak = best_layer_rate(rates)
    requests = sum(len(benchmark.prompts(rows)) for rows in args.concurrency)
    if args.compare:
        requests += requests_to_compare(benchmark)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=requests, unit="request"))
        url, budget = args.base_url, None
        if url is None:
            server = stack.enter_context(benchmark.server(max(args.concurrency)))
            url, budget = server.url, server.token_budget
        decoding = benchmark.warm_up(url)
        levels = []
        for concurrency in args.concurrency:
            bar.set_description(f"concurrency {concurrency}")
            level = benchmark.level(url, concurrency, bar.update)
            levels.append(level.summary(benchmark.spec, peak))
        data: dict[str, Any] = {"matrix_rates": rates, "decoding": decoding, "levels": levels}
        if args.compare:
            bar.set_description("baselines")
            data["compared"] = compare(benchmark, (url, budget), decoding, bar.update)
    return data


def run_short_among_long(benchmark: Benchmark) -> dict[str, Any]:
    """Short requests while long ones run."""
    args = benchmark.args
    context = benchmark.spec.max_model_len
    long = benchmark.exactly(LONG_ROWS, min(256, context // 4), min(512, context // 2))
    short = benchmark.exactly(args.probes or 40, 16, 32)
    with contextlib.ExitStack() as stack:
        url = args.base_url or stack.enter_context(benchmark.server(LONG_ROWS + 1)).url
        benchmark.warm_up(url)
        bar = stack.enter_context(tqdm(total=len(short), unit="request"))
        # Committed at once, so that the first chunk tells when the request was served, and not in
        # which order a model writes its tokens.
        quick = benchmark.client(url, {"cache": args.cache, **AT_ONCE})
        return asyncio.run(
            short_among_long(url, benchmark.client(url), quick, long, short, bar.update)
        )


def run_long_prompt(benchmark: Benchmark) -> dict[str, Any]:
    """Long prompts while short rows run.

    Raises:
        SystemExit: the model's context is too short.
    """
    if benchmark.spec.max_model_len <= LONG_PROMPT:
        raise SystemExit(
            f"The model's context is {benchmark.spec.max_model_len} tokens, and the long prompt "
            f"has {LONG_PROMPT}. Take another model, for example --random 12x512x8192."
        )
    long = benchmark.exactly(benchmark.args.probes or 5, LONG_PROMPT, 1)
    running = benchmark.mixed(RUNNING_ROWS, (32, 64), (96, 192))
    with benchmark.server(1) as server:
        decoding, budget = benchmark.warm_up(server.url), server.token_budget
    bare = benchmark.bare_engine(decoding, budget)
    with tqdm(total=len(long), unit="prompt") as bar:
        return long_prompt(bare, running, long, bar.update)


def name_of(device: torch.device) -> str:
    """A device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


SCENARIO_RUNS: dict[str, Callable[[Benchmark], dict[str, Any]]] = {
    "load": run_load,
    "short_among_long": run_short_among_long,
    "long_prompt": run_long_prompt,
}


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[Benchmark]:
    """The benchmark of a command line; a random checkpoint lasts as long as the context."""
    with tempfile.TemporaryDirectory(prefix="vdiff-random-") as temporary:
        folder = args.model_dir
        if args.random:
            folder = write_random_checkpoint(
                Path(temporary), parse_sizes(args.random), device=choose_device(args.device),
                context=args.context or CONTEXT,
            )  # fmt: skip
        yield Benchmark(args, folder)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark of a command line; returns what it prints as JSON."""
    args = parse_arguments(argv)
    given = sys.argv[1:] if argv is None else argv
    with opened(args) as benchmark:
        report = {
            "command": shlex.join(["python", "-m", "benchmarks.serving", *given]),
            "scenario": args.scenario,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": name_of(benchmark.device),
            "dtype": str(benchmark.dtype).removeprefix("torch."),
            "context": benchmark.spec.max_model_len,
            **SCENARIO_RUNS[args.scenario](benchmark),
        }
    serving_report.show(report)
    line = json.dumps(report)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
