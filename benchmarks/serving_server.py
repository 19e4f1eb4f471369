"""The server under load: its process, and what its /metrics tell about its rounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

START_LIMIT_S = 600
STOP_LIMIT_S = 60
REST_S = 0.1
READY = re.compile(r" is ready at (http://[\w.:]+)")
BUDGET = re.compile(r"whole passes take at most (\d+) tokens")
FLAGS = ("--host", "127.0.0.1", "--port", "0", "--enable_grpc", "false")
PHASES = ("plan", "forward", "sample", "apply")
DIFFUSION_PASSES = ("refresh", "reuse", "commit")

Samples = dict[tuple[str, str], float]
"""(metric, value of its label beside the model's name) -> value."""


class Server:
    """`python -m vdiff_kserve` on a free port, for as long as the context lasts.

    Attributes:
        url: where it listens.
        token_budget: tokens that it lets a round spend on whole passes; None when it did not say.
    """

    def __init__(self, model_dir: Path, *flags: str) -> None:
        self.token_budget: int | None = None
        self._lines: deque[str] = deque(maxlen=40)
        self._ready: SimpleQueue[str | None] = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vdiff_kserve", "--model_dir", str(model_dir), *FLAGS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        try:
            url = self._ready.get(timeout=START_LIMIT_S)
        except Empty:
            url = None
        if url is None:
            self.__exit__()
            raise SystemExit("The server did not start:\n" + "".join(self._lines))
        self.url = url
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        """Read what it writes, so that its pipe never fills."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if found := BUDGET.search(line):
                self.token_budget = int(found[1])
            if found := READY.search(line):
                self._ready.put(found[1])
        self._ready.put(None)


def model_name(url: str) -> str:
    """The first model that a server lists."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def scrape(url: str) -> Samples:
    """The metrics of a server with one model."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        page = response.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.startswith("vdiff_") or sample.name.endswith("_bucket"):
                continue
            others = [v for k, v in sample.labels.items() if k != "model_name"]
            samples[sample.name, others[0] if others else ""] = sample.value
    return samples


def scrape_at_rest(url: str) -> Samples:
    """The metrics once nothing runs: a round is counted a moment after its tokens are sent."""
    latest = scrape(url)
    while True:
        time.sleep(REST_S)
        before, latest = latest, scrape(url)
        at_rest = not latest["vdiff_requests_running", ""]
        if at_rest and not Rounds.between(before, latest).count:
            return latest


@dataclass(frozen=True)
class Rounds:
    """What a server's engine did between two looks at its metrics.

    Attributes:
        count: rounds in which rows took a step.
        rows: steps of single rows.
        passes: forward passes of the diffusion model, one per row and step.
        computed: tokens that they ran over.
        cached: tokens that they read from the cache instead.
        attended: pairs of a computed token and one that it sees.
        committed: tokens written to canvases.
        generated: tokens sent as final.
        seconds: time by phase: plan, forward, sample, apply.
    """

    count: int
    rows: int
    passes: int
    computed: int
    cached: int
    attended: int
    committed: int
    generated: int
    seconds: dict[str, float]

    @classmethod
    def between(cls, before: Samples, after: Samples) -> Rounds:
        """The difference of two looks."""

        def grown(name: str, label: str = "") -> float:
            return after.get((name, label), 0.0) - before.get((name, label), 0.0)

        return cls(
            count=int(grown("vdiff_round_rows_count")),
            rows=int(grown("vdiff_round_rows_sum")),
            passes=int(sum(grown("vdiff_forwards_total", kind) for kind in DIFFUSION_PASSES)),
            computed=int(grown("vdiff_forward_tokens_total", "computed")),
            cached=int(grown("vdiff_forward_tokens_total", "cached")),
            attended=int(grown("vdiff_forward_attended_total")),
            committed=int(grown("vdiff_parallel_tokens_decoded_total")),
            generated=int(grown("vdiff_generation_tokens_total")),
            seconds={phase: grown("vdiff_round_seconds_sum", phase) for phase in PHASES},
        )

    @property
    def total_seconds(self) -> float:
        """Time spent in rounds."""
        return sum(self.seconds.values())

    @property
    def mean_seconds(self) -> float:
        return self.total_seconds / self.count if self.count else 0.0

    @property
    def bookkeeping(self) -> float:
        """Share of a round's time that plan and apply take."""
        own = self.seconds["plan"] + self.seconds["apply"]
        return own / self.total_seconds if self.total_seconds else 0.0
