"""What the front end costs a request: all from the body's bytes to the answer's, but the model.

    python -m benchmarks.frontend

Chats of the embedded model's tokenizer and template are answered by an engine that has every answer
ready, in as many chunks as asked for, and streamed. The clock is this process's processor time.
`service` is parsing and checks of the body, template, tokenizer, detokenizer and chunks; `whole` is
the same behind the routes and guards, as an ASGI application without a socket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI
from kserve import ModelRepository
from tqdm import tqdm

from benchmarks.instant import InstantEngine, use_instant_engine
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.openai import handlers
from vdiff_kserve.openai.dataplane import EngineDataPlane
from vdiff_kserve.openai.guards import Access
from vdiff_kserve.openai.protocol import ChatCompletionRequest
from vdiff_kserve.openai.routes import build_router

NAME = "llada"
MAX_TOKENS = 256
CHUNKS = (1, 8, 32, 64, 128, 256)
REQUEST_BUDGET_MS = 2.0
CHUNK_BUDGET_MS = 0.1
QUESTION = (
    "Write a short story about a river, a bridge and an old clock that stopped at noon. "
    "Then sort the numbers 12, 7, 93, 41 and 5, and tell me what 17 + 25 is."
)
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": QUESTION},
]

Answer = Callable[[bytes], Awaitable[int]]
"""Answers a body; returns how many chunks with text there were."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of processor time of one request, by the number of its chunks."""

    chunks: Sequence[int]
    milliseconds: Sequence[float]

    @property
    def line(self) -> tuple[float, float]:
        """Milliseconds per request and per chunk: the line through the measurements."""
        slope, base = np.polyfit(self.chunks, self.milliseconds, 1)
        return float(base), float(slope)

    @property
    def within_budget(self) -> bool:
        return all(
            cost <= REQUEST_BUDGET_MS + CHUNK_BUDGET_MS * chunks
            for chunks, cost in zip(self.chunks, self.milliseconds, strict=True)
        )


def body_of(max_tokens: int, *, stream: bool = True) -> bytes:
    """A chat request as a client's library would send it."""
    request = {
        "model": NAME,
        "messages": CONVERSATION,
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": 1,
        "stop": ["\nUser:"],
        "stream": stream,
    }
    if stream:
        request["stream_options"] = {"include_usage": True}
    return json.dumps(request).encode()


async def load() -> DiffusionModel:
    """The embedded model around an instant engine."""
    use_instant_engine()
    model = DiffusionModel(ServerConfig(model_name=NAME))
    await model.start_engine()
    return model


def through_service(model: DiffusionModel) -> Answer:
    """Answers a body without the HTTP framework."""

    async def answer(body: bytes) -> int:
        request = ChatCompletionRequest.model_validate_json(body)
        events = await model.create_chat_completion(request)
        sent = [event.encode() async for event in events]  # type: ignore[union-attr]
        return _texts(sent)

    return answer


def through_application(model: DiffusionModel) -> Answer:
    """Answers a body as an HTTP request without a socket."""
    registry = ModelRepository()
    registry.update(model)
    app = FastAPI()
    handlers.install(app, NAME, Access((), ()), max_body_bytes=1 << 20)
    app.include_router(build_router(EngineDataPlane(registry), NAME))
    headers = [(b"content-type", b"application/json"), (b"host", b"bench")]

    async def answer(body: bytes) -> int:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.Event()
        sent: list[bytes] = []

        async def receive() -> Any:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 200, message
            sent.append(message.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
            "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
            "headers": [*headers, (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        await app(scope, receive, send)
        return _texts(sent)

    return answer


def _texts(sent: Sequence[bytes]) -> int:
    """Chunks that carried text: all but the first empty one, usage, and the end."""
    return sum(b'"delta":{' in each for each in sent)


async def measure(
    answer: Answer, chunks: Sequence[int], requests: int, rounds: int, title: str
) -> Cost:
    """The least of `rounds` means over `requests`, for each number of chunks.

    The least, since whatever else the machine does can only add to processor time.
    """
    body = body_of(MAX_TOKENS)
    costs = []
    for count in tqdm(chunks, desc=title, unit="size"):
        InstantEngine.tokens_per_chunk = MAX_TOKENS // count
        told = await answer(body)
        assert told <= count, f"{told} chunks, not {count}"
        means = []
        for _ in range(rounds):
            began = time.process_time()
            for _ in range(requests):
                await answer(body)
            means.append((time.process_time() - began) / requests)
        costs.append(min(means) * 1000)
    return Cost(chunks, costs)


async def run(requests: int, rounds: int) -> dict[str, Cost]:
    """The costs of the front end, by the part that is measured."""
    model = await load()
    ways = {"service": through_service(model), "whole": through_application(model)}
    costs = {name: await measure(way, CHUNKS, requests, rounds, name) for name, way in ways.items()}
    model.stop()
    return costs


def report(costs: dict[str, Cost]) -> str:
    """The costs as a table in Markdown."""
    lines = [f"| chunks of {MAX_TOKENS} tokens | " + " | ".join(costs) + " | budget |"]
    lines.append("|---|" + "---|" * (len(costs) + 1))
    for i, count in enumerate(CHUNKS):
        budget = REQUEST_BUDGET_MS + CHUNK_BUDGET_MS * count
        cells = " | ".join(f"{cost.milliseconds[i]:.2f} ms" for cost in costs.values())
        lines.append(f"| {count} | {cells} | {budget:.1f} ms |")
    fits = " | ".join("{:.2f} ms + {:.3f} ms per chunk".format(*c.line) for c in costs.values())
    budget_line = f"{REQUEST_BUDGET_MS:.1f} ms + {CHUNK_BUDGET_MS:.1f} ms per chunk"
    lines.append(f"| a line through them | {fits} | {budget_line} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=50, help="of one mean")
    parser.add_argument("--rounds", type=int, default=5, help="means, of which the least counts")
    args = parser.parse_args()
    costs = asyncio.run(run(args.requests, args.rounds))
    print("\n" + report(costs))
    print("within the budget: " + ("yes" if costs["service"].within_budget else "no"))


if __name__ == "__main__":
    main()
