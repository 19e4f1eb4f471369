"""A server with replicas, seen from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import psutil

from tests.server.process import ServerProcess
from tests.waiting import wait_until


class ReplicatedServer(ServerProcess):
    """`python -m vdiff_kserve --replicas N`."""

    def metric(self, name: str) -> float:
        """The sum of a metric's series whose names begin so."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    @property
    def num_ready(self) -> int:
        return int(self.metric('vdiff_replicas{model_name="tiny",state="ready"}'))

    def pids(self) -> list[int]:
        """The replicas' processes, of a Ray that the server started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each.pid for each in children if _title(each).startswith("ray::Replica")]

    def kill_one(self) -> int:
        """SIGKILL a replica; its process id."""
        pid = self.pids()[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_for_replicas(self, count: int) -> None:
        wait_until(lambda: self.num_ready == count and len(self.pids()) == count)


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:
        return ""


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Completions that differ in length, decoding and seed."""
    bodies: list[dict[str, Any]] = []
    for i in range(count):
        body = {"prompt": f"{i} the tale of {'a' * (i % 40)}", "max_tokens": 4 + i % 29, "seed": i}
        if i % 2:
            body |= {"temperature": 0.9, "top_p": 0.95}
        body |= [{}, {"policy": "threshold", "threshold": 0.2}, {"cache": "dual"}][i % 3]
        bodies.append(body)
    return bodies


LONG = {"max_tokens": 96, "block_length": 8, "ignore_eos": True, "temperature": 1.0}
"""Some hundred chunks, so that there is a middle."""


def long_requests(count: int) -> list[dict[str, Any]]:
    return [LONG | {"prompt": f"story {i}", "seed": i} for i in range(count)]


async def complete(url: str, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of completions that are asked for at once."""
    async with _client(url) as client:
        responses = await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))
    return [each.raise_for_status().json()["choices"][0]["text"] for each in responses]


async def stream(
    url: str, bodies: Sequence[dict[str, Any]], in_the_middle: Callable[[], object] | None = None
) -> list[str]:
    """The same as streams; `in_the_middle` is called once each has begun."""
    begun = [asyncio.Event() for _ in bodies]

    async def read(body: dict[str, Any], has_begun: asyncio.Event) -> str:
        text = ""
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as lines:
            lines.raise_for_status()
            async for line in lines.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    text += "".join(choice["text"] for choice in chunk["choices"])
                    has_begun.set()
        return text

    async with _client(url) as client:
        tasks = [asyncio.create_task(read(*pair)) for pair in zip(bodies, begun, strict=True)]
        if in_the_middle is not None:
            await asyncio.gather(*(each.wait() for each in begun))
            await asyncio.to_thread(in_the_middle)
        return await asyncio.gather(*tasks)


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=300, limits=limits)
