"""What replicas bring, and what the way to them costs.

    python -m benchmarks.replicas

`--parts` chooses. Throughput: the embedded model as one replica with two threads and as two with
one, the same requests. Overhead: engines without a model, in this process and in a replica, asked
in the same way; a request is timed from `submit` to its only event, a chunk from the engine's
thread to who reads the stream; to compare, a call of a Ray actor that does nothing. Front end: a
server with two replicas of the embedded model under load, its processor time by process; then
servers whose engines answer at once, with the requests that their front end answers on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import psutil
import ray
from tqdm import tqdm

from benchmarks.replica_engines import instant_model, paced_model
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.replica import Loader
from vdiff_kserve.distributed.start import start_replicas
from vdiff_kserve.distributed.tensor_parallel import load_sharded
from vdiff_kserve.engine import GenerationEngine, GenerationRequest, GenerationStream
from vdiff_kserve.sampler import DecodingParams

REQUEST_BUDGET_MS = 5.0
CHUNK_BUDGET_MS = 1.0
PROMPT = tuple(range(20, 84))
NAME = "llada"
PARTS = ("throughput", "overhead", "front")


@dataclass(frozen=True)
class Times:
    """Milliseconds of many occurrences."""

    all: Sequence[float]

    def percentile(self, share: int) -> float:
        return float(np.percentile(self.all, share))

    def __str__(self) -> str:
        return f"p50 {self.percentile(50):.2f} ms, p95 {self.percentile(95):.2f} ms"


@dataclass(frozen=True)
class Overhead:
    """The same in this process and in a replica."""

    here: Times
    replica: Times

    def added(self, share: int) -> float:
        """Milliseconds that the replica adds at a percentile."""
        return self.replica.percentile(share) - self.here.percentile(share)

    def row(self, name: str, budget: float) -> str:
        added = f"p50 {self.added(50):.2f} ms, p95 {self.added(95):.2f} ms"
        return f"| {name} | {self.here} | {self.replica} | {added} | {budget:g} ms |"


def request_of(number: int, tokens: int, **decoding: object) -> GenerationRequest:
    params = DecodingParams(logits_eos_inf=True, seed=number, **decoding)  # type: ignore[arg-type]
    return GenerationRequest((*PROMPT, 20 + number % 64), tokens, params)


class Idler:
    """An actor to call."""

    async def answer(self) -> None:
        """Nothing."""


@asynccontextmanager
async def replicated_engine(
    config: ServerConfig, loader: Loader
) -> AsyncIterator[GenerationEngine]:
    """All replicas of a configuration, ready."""
    model = await start_replicas(config, loader=loader)
    low = int(str(config.replicas).partition(":")[0])
    while sum(link.facts is not None for link in model.engine.links) < low:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    try:
        yield model.engine
    finally:
        await asyncio.to_thread(model.engine.stop)


async def last_event(stream: GenerationStream) -> int:
    """Tokens of an answer."""
    return sum([len(event.token_ids) async for event in stream])


async def throughput(replicas: int, threads: int, requests: int) -> float:
    """Tokens per second of a closed list of requests of the embedded model."""
    config = ServerConfig(
        dtype="float32", replicas=str(replicas), replica_cpus=float(threads), max_queue=requests
    )
    work = [request_of(n, 64, cache="dual", temperature=0.7) for n in range(requests)]
    async with replicated_engine(config, load_sharded) as engine:
        await asyncio.gather(*map(last_event, engine.submit(work[: 4 * replicas])))
        started = time.perf_counter()
        tokens = await asyncio.gather(*map(last_event, engine.submit(work)))
        return sum(tokens) / (time.perf_counter() - started)


async def request_times(engine: GenerationEngine, requests: int, title: str) -> Times:
    """From `submit` to the only event, one request after the other."""
    times = []
    for number in tqdm(range(requests), desc=title, unit="request"):
        started = time.perf_counter()
        (stream,) = engine.submit([request_of(number, 64)])
        await last_event(stream)
        times.append((time.perf_counter() - started) * 1000)
    return Times(times)


async def call_times(calls: int) -> Times:
    """Of calls of a Ray actor, one after the other."""
    actor = ray.remote(Idler).options(num_cpus=0).remote()
    times = []
    for _ in tqdm(range(50 + calls), desc="calls of Ray", unit="call"):
        started = time.perf_counter()
        await actor.answer.remote()
        times.append((time.perf_counter() - started) * 1000)
    return Times(times[50:])


async def chunk_times(engine: GenerationEngine, streams: int, chunks: int) -> tuple[Times, float]:
    """From the engine's thread to here, of streams that run together; this process's milliseconds
    of processor time per chunk."""
    times: list[float] = []

    async def read(stream: GenerationStream) -> None:
        async for event in stream:
            heard = time.monotonic()
            times.append((heard - event.stats.queue_seconds) * 1000)

    used = time.process_time()
    submitted = engine.submit([request_of(number, chunks) for number in range(streams)])
    await asyncio.gather(*map(read, submitted))
    return Times(times), (time.process_time() - used) * 1000 / len(times)


async def overheads(
    requests: int, streams: int, chunks: int
) -> tuple[Overhead, Overhead, Times, float]:
    """Per request, per chunk, per call of Ray, and the front end's processor time per chunk."""
    config = ServerConfig(replicas="1", max_num_seqs=max(8, streams))
    here = instant_model(config).engine
    request_here = await request_times(here, requests, "here")
    async with replicated_engine(config, instant_model) as engine:
        await request_times(engine, 50, "warm-up")
        request_there = await request_times(engine, requests, "in a replica")
        calls = await call_times(requests)
    chunk_here, _ = await chunk_times(paced_model(config).engine, streams, chunks)
    async with replicated_engine(config, paced_model) as engine:
        await chunk_times(engine, streams, 20)
        chunk_there, cost = await chunk_times(engine, streams, chunks)
    request, chunk = Overhead(request_here, request_there), Overhead(chunk_here, chunk_there)
    return request, chunk, calls, cost


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server process: its URL and itself."""
    command = [sys.executable, *arguments, "--model_name", NAME, "--enable_grpc", "false"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--log_level", "warning"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = next(m[1] for line in process.stdout if (m := re.search(r"ready at (http\S+)", line)))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def replica_processes(front: psutil.Process) -> list[psutil.Process]:
    return [
        each
        for each in front.children(recursive=True)
        if each.is_running() and "".join(each.cmdline()).startswith("ray::Replica")
    ]


async def load(url: str, requests: int, clients: int, tokens: int, title: str) -> float:
    """Requests per second of a closed loop of streaming chats."""
    body = {
        "messages": [{"role": "user", "content": "Sort: 9 3 7 1. Then tell me a short story."}],
        "max_tokens": tokens,
        "stream": True,
    }
    numbers = iter(tqdm(range(requests), desc=title, unit="request"))

    async def client(http: httpx.AsyncClient) -> None:
        for number in numbers:
            content = json.dumps(body | {"seed": number})
            headers = {"Content-Type": "application/json"}
            async with http.stream(
                "POST", "/v1/chat/completions", content=content, headers=headers
            ) as response:
                response.raise_for_status()
                async for _ in response.aiter_bytes():
                    pass

    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return requests / (time.perf_counter() - started)


def front_end(requests: int, clients: int) -> Iterator[str]:
    """Rows about a server with two replicas of the embedded model."""
    with server("-m", "vdiff_kserve", "--replicas", "2") as (url, front):
        asyncio.run(load(url, clients, clients, 64, "warm-up"))
        replicas = replica_processes(front)
        before = processor_seconds([front]), processor_seconds(replicas)
        rate = asyncio.run(load(url, requests, clients, 64, "embedded model"))
        own = (processor_seconds([front]) - before[0]) / requests * 1000
        theirs = (processor_seconds(replicas) - before[1]) / requests * 1000
    share = own / (own + theirs)
    yield f"| 2 replicas of the embedded model | {rate:.1f} | {own:.2f} ms | {theirs:.1f} ms |"
    yield f"| the front end's share | | {share:.1%} | |"


def saturation(requests: int, clients: int) -> Iterator[str]:
    """Rows about front ends before engines that answer at once."""
    ways: dict[str, tuple[str, ...]] = {
        "instant engine in the process": ("-m", "benchmarks.instant", "--tokens_per_chunk", "8"),
        "2 instant replicas": ("-m", "benchmarks.replicas", "--serve_instant"),
    }
    for name, arguments in ways.items():
        with server(*arguments) as (url, front):
            asyncio.run(load(url, 4 * clients, clients, 64, "warm-up"))
            before = processor_seconds([front])
            rate = asyncio.run(load(url, requests, clients, 64, name))
            own = (processor_seconds([front]) - before) / requests * 1000
        yield f"| {name} | {rate:.0f} | {own:.2f} ms | {1000 / own:.0f} requests/s on one core |"


def serve_instant(server_flags: Sequence[str]) -> int:
    """A server with two replicas that answer at once, 8 tokens a chunk."""
    from vdiff_kserve.distributed import start

    defaults = list(start.start_replicas.__defaults__ or ())
    start.start_replicas.__defaults__ = (*defaults[:-1], instant_model)
    from vdiff_kserve.__main__ import main as serve

    sys.argv[1:] = ["--replicas", "2", "--default_max_tokens", "8", *server_flags]
    return serve()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=400, help="of the overhead and front end")
    parser.add_argument("--work", type=int, default=96, help="requests of the throughput")
    parser.add_argument("--streams", type=int, default=8, help="that chunks are timed in")
    parser.add_argument("--chunks", type=int, default=200, help="of each of them")
    parser.add_argument("--clients", type=int, default=16, help="of the front end")
    parser.add_argument("--serve_instant", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.serve_instant:
        return serve_instant(rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray gives each replica as many as it has cores
    for part in args.parts:
        tables = {"throughput": throughput_table, "overhead": overhead_table, "front": front_table}
        print("\n" + "\n".join(tables[part](args)), flush=True)
    return 0


def throughput_table(args: argparse.Namespace) -> Iterator[str]:
    one = asyncio.run(throughput(1, 2, args.work))
    two = asyncio.run(throughput(2, 1, args.work))
    yield "| replicas | threads each | tokens/s | ratio |\n|---|---|---|---|"
    yield f"| 1 | 2 | {one:.0f} | 1 |\n| 2 | 1 | {two:.0f} | {two / one:.2f} |"


def overhead_table(args: argparse.Namespace) -> Iterator[str]:
    request, chunk, calls, cost = asyncio.run(overheads(args.requests, args.streams, args.chunks))
    yield "| overhead | in this process | in a replica | that adds | budget |"
    yield "|---|---|---|---|---|"
    yield request.row("a request", REQUEST_BUDGET_MS)
    yield chunk.row(f"a chunk, {args.streams} streams", CHUNK_BUDGET_MS)
    yield f"| a call of Ray, to compare | | {calls} | | |"
    yield f"\nprocessor time of the front end per chunk: {cost:.3f} ms"


def front_table(args: argparse.Namespace) -> Iterator[str]:
    rows = [*front_end(args.requests, args.clients), *saturation(args.requests, args.clients)]
    yield "| server | requests/s | front end's time per request | beside it |\n|---|---|---|---|"
    yield from rows


if __name__ == "__main__":
    sys.exit(main())
