"""What the server adds to the bare engine: start-up time and time per request at concurrency 1.

    python -m benchmarks.overhead

Starts a real server process on a free port, asks it over HTTP, and gives the same requests to an
engine in this process, in turns, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import (
    choose_device,
    choose_dtype,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)
from vdiff_kserve.sampler import DecodingParams

PROMPTS = (
    "What is 17 + 25?",
    "Sort 5, 3, 9.",
    "What is the capital of France?",
    "Tell me about the sun.",
)
SERVER_FLAGS = ("--host", "127.0.0.1", "--port", "0", "--enable_grpc", "false")
START_LIMIT_S = 120


@contextlib.contextmanager
def server(model_dir: Path) -> Iterator[tuple[str, float]]:
    """A server process; yields its address and the seconds from its start to ready."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vdiff_kserve", "--model_dir", str(model_dir), *SERVER_FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    told = []
    try:
        for line in process.stdout:
            told.append(line)
            if "ready" in line.lower() and (found := re.search(r"http://[\w.:]+", line)):
                break
        else:
            raise SystemExit("the server did not start:\n" + "".join(told))
        ready_after = time.perf_counter() - began
        # Its log must not fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        yield found.group().rstrip("/"), ready_after
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_LIMIT_S)
        drain.wait()
    finally:
        process.kill()


def ask(address: str, prompt: str, max_tokens: int) -> dict[str, object]:
    """One chat request, decoded exactly."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "profile": "exact",
        "seed": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        answer: dict[str, object] = json.load(response)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=EMBEDDED)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="times that each prompt is asked")
    args = parser.parse_args()
    device = choose_device("auto")
    # On a thread that ends, as in the server: OpenMP threads of this one would stay and compete.
    with ThreadPoolExecutor(max_workers=1) as loader:
        dtype = choose_dtype("auto", device)
        decoder, spec = loader.submit(load_decoder, args.model_dir, device, dtype).result()
    tokenizer = load_tokenizer(args.model_dir)
    engine = Engine(decoder, spec, EngineConfig(max_num_seqs=1))
    engine.start()
    ends = with_end_of_turn(spec, tokenizer).end_token_ids
    decoding = DecodingParams(block_length=spec.block_length)
    requests = {
        prompt: GenerationRequest(
            tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], return_dict=False
                )
            ),
            args.max_tokens,
            decoding,
            ends,
        )
        for prompt in PROMPTS
    }
    alone: list[float] = []
    served: list[float] = []
    with server(args.model_dir) as (address, ready_after):
        for prompt in PROMPTS:
            ask(address, prompt, args.max_tokens)
            engine.generate([requests[prompt]])
        for prompt in tqdm(PROMPTS * args.rounds, unit="request"):
            began = time.perf_counter()
            (result,) = engine.generate([requests[prompt]])
            middle = time.perf_counter()
            answer = ask(address, prompt, args.max_tokens)
            served.append(time.perf_counter() - middle)
            alone.append(middle - began)
            assert answer["vdiff"]["nfe"] == result.stats.nfe  # type: ignore[index]
    engine.stop()
    ratios = [s / a for s, a in zip(served, alone, strict=True)]
    print(f"\nstart to ready:        {ready_after:8.2f} s ({os.cpu_count()} cores)")
    print(f"engine, per request:   {statistics.median(alone) * 1000:8.1f} ms (median)")
    print(f"server, per request:   {statistics.median(served) * 1000:8.1f} ms (median)")
    print(f"overhead:              {(sum(served) / sum(alone) - 1) * 100:8.1f} % of all requests")
    print(f"overhead, median:      {(statistics.median(ratios) - 1) * 100:8.1f} %")


if __name__ == "__main__":
    main()
