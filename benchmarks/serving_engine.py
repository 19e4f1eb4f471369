"""The engine without a server: the same requests at the same batch, and the time of every step."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.load import FULL_LENGTH, Prompt, out_of_step, percentiles
from benchmarks.serving_machine import on_a_passing_thread
from vdiff_kserve.decoding import DECODING_FIELDS
from vdiff_kserve.engine import (
    REFRESH_SECONDS,
    Engine,
    EngineConfig,
    EngineError,
    GenerationEvent,
    GenerationRequest,
    RoundObserver,
    RoundReport,
    measured_token_budget,
)
from vdiff_kserve.models import Decoder, ModelSpec, load_decoder
from vdiff_kserve.sampler import DecodingParams

START_LIMIT_S = 60
QUIET_ROUNDS = 100

E = TypeVar("E", bound=Engine)
EventSink = Callable[[GenerationEvent | EngineError], None]


def decoding_of(report: Mapping[str, Any]) -> DecodingParams:
    """The decoding that an answer of the server tells it had (`vdiff.decoding`), for answers of
    full length."""
    fields = {name: value for name, value in report.items() if name in DECODING_FIELDS}
    if fields.get("steps") == report.get("max_tokens"):
        fields.pop("steps", None)
    return DecodingParams(**fields, logits_eos_inf=FULL_LENGTH["logits_eos_inf"])


@dataclass(frozen=True)
class EngineRun:
    """What the bare engine did with a list of requests.

    Attributes:
        bookkeeping: share of its rounds' time that was neither model nor sampling.
    """

    rows: int
    seconds: float
    tokens: int
    passes: int
    bookkeeping: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class BareEngine:
    """A checkpoint in this process, and how its engine is set up.

    Attributes:
        token_budget: tokens that a round spends on whole passes.
    """

    decoder: Decoder
    spec: ModelSpec
    decoding: DecodingParams
    token_budget: int

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        decoding: DecodingParams,
        token_budget: int | None,
    ) -> BareEngine:
        """Read the checkpoint; without a budget, measure it as the server does.

        Raises:
            CheckpointError: the folder cannot be served.
        """

        def load() -> BareEngine:
            decoder, spec = load_decoder(folder, device, dtype)
            budget = token_budget or measured_token_budget(decoder, spec.max_model_len)
            return cls(decoder, spec, decoding, budget)

        return on_a_passing_thread(load)

    def start(
        self, rows: int, queue: int, kind: type[E], observer: RoundObserver | None = None
    ) -> E:
        """An engine for `rows` at once."""
        config = EngineConfig(
            max_num_seqs=rows,
            max_queue=queue,
            max_num_batched_tokens=self.token_budget,
            observer=observer,
        )
        engine = kind(self.decoder, self.spec, config)
        engine.start()
        return engine

    def request(self, prompt: Prompt) -> GenerationRequest:
        """A prompt of the load, with an answer of exactly its length."""
        return GenerationRequest(prompt.token_ids, prompt.max_tokens, self.decoding)

    def warm_up(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        """Answer `prompts`. On a GPU also run what is captured, so that none of it is captured
        while the clock runs: passes of one row, and cached ones of all numbers of rows."""
        sizes = engine.captured_sizes
        if sizes:
            engine.generate([self.request(prompts[0])])
        engine.generate([self.request(prompt) for prompt in prompts])
        short = replace(prompts[0], max_tokens=min(prompts[0].max_tokens, self.spec.block_length))
        for rows in sizes:
            engine.generate([self.request(short)] * rows)

    def run(self, prompts: Sequence[Prompt], rows: int, warm_up: Sequence[Prompt]) -> EngineRun:
        """Answer `prompts`, at most `rows` at once."""
        reports: list[RoundReport] = []
        queue = max(rows, len(prompts), len(warm_up))
        engine = self.start(rows, queue, Engine, reports.append)
        self.warm_up(engine, warm_up)
        reports.clear()
        began = time.perf_counter()
        results = engine.generate([self.request(prompt) for prompt in prompts])
        seconds = time.perf_counter() - began
        engine.stop()
        return EngineRun(
            rows,
            seconds,
            sum(result.stats.completion_tokens for result in results),
            sum(result.stats.nfe for result in results),
            _bookkeeping(reports),
        )

    def gain(self, prompts: Sequence[Prompt], rows: int) -> float:
        """How much faster rounds of at most `rows` compute them together than one by one."""
        paired = self.start(rows, len(prompts), PairedEngine)
        paired.generate([self.request(prompt) for prompt in prompts])
        paired.stop()
        return paired.one_by_one / paired.together


def _bookkeeping(reports: Sequence[RoundReport]) -> float:
    own = sum(report.plan_seconds + report.apply_seconds for report in reports)
    model = sum(report.forward_seconds + report.sample_seconds for report in reports)
    return own / (own + model)


class PairedEngine(Engine):
    """An engine that computes every step twice: its rows one by one, and together. Both are of the
    same moment, so a machine whose speed swings does not change their ratio.

    Attributes:
        one_by_one: seconds of all steps in the first way; `together`, in the second.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.one_by_one = self.together = 0.0

    def _attempt(self, rows: Sequence[Any]) -> Any:
        began = time.perf_counter()
        for row in rows:
            self._runner.step([row])
        between = time.perf_counter()
        attempted = super()._attempt(rows)
        self.one_by_one += between - began
        self.together += time.perf_counter() - between
        return attempted


class WatchedEngine(Engine):
    """An engine that notes when each of its rows took a step.

    Attributes:
        steps: for each request that began, the times of its steps, of `time.perf_counter`.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[list[float]] = []

    def make_row(self, request: GenerationRequest, sink: EventSink) -> Any:
        """The row that will run `request`, watched."""
        row = super().make_row(request, sink)
        apply, times = row.apply, []
        self.steps.append(times)

        def apply_and_note(decision: Any) -> None:
            apply(decision)
            times.append(time.perf_counter())

        row.apply = apply_and_note  # type: ignore[method-assign]
        return row

    def step_times(self, began: float, ended: float) -> list[float]:
        """Seconds from one step of a row to its next, of those that overlap a span of time."""
        return [
            later - earlier
            for times in list(self.steps)
            for earlier, later in pairwise(list(times))
            if earlier < ended and later > began
        ]


def long_prompt(
    engine: BareEngine,
    running: Sequence[Prompt],
    long: Sequence[Prompt],
    on_arrival: Callable[[], object],
) -> dict[str, Any]:
    """How the arrival of long prompts stretches the steps of rows that run.

    HTTP shows chunks, and many steps send none; so this watches the rows of an engine in this
    process. One thread per running row asks again and again, all out of step.

    Args:
        long: arrives one after the other, each when the one before is answered.
    """
    rows = len(running) + 1
    watched = engine.start(rows, rows, WatchedEngine)
    stopped = threading.Event()
    rng = random.Random(0)

    def keep_running(first: Prompt, prompt: Prompt) -> None:
        with contextlib.suppress(EngineError):
            watched.generate([engine.request(first)])
            while not stopped.is_set():
                watched.generate([engine.request(prompt)])

    threads = [
        threading.Thread(target=keep_running, args=(out_of_step(p, rng), p), daemon=True)
        for p in running
    ]
    for thread in threads:
        thread.start()
    before: list[float] = []
    during: list[float] = []
    waits = []
    try:
        _let_rounds_pass(watched)
        for prompt in long:
            since = time.perf_counter()
            _let_rounds_pass(watched)
            sent = time.perf_counter()
            before += watched.step_times(since, sent)
            watched.generate([engine.request(prompt)])
            ended = time.perf_counter()
            waits.append(ended - sent)
            during += watched.step_times(sent, ended)
            on_arrival()
    finally:
        stopped.set()
        watched.stop()
        for thread in threads:
            thread.join()
    usual = percentiles(before)["p50"]
    return {
        "running_rows": len(running),
        "prompt_tokens": len(long[0].token_ids),
        "token_budget": engine.token_budget,
        "step_before": percentiles(before) | {"longest": max(before)},
        "step_during": percentiles(during) | {"longest": max(during)},
        "stretch_of_the_usual_step": percentiles(during)["p50"] - usual,
        "stretch_of_the_longest_step": max(during) - max(before),
        "longest_step_over_the_usual_one": max(during) - usual,
        "budget_seconds": REFRESH_SECONDS,
        "answered_after": percentiles(waits),
    }


def _let_rounds_pass(engine: Engine) -> None:
    goal, limit = engine.num_steps + QUIET_ROUNDS, time.perf_counter() + START_LIMIT_S
    while engine.num_steps < goal:
        if time.perf_counter() > limit:
            raise SystemExit("The running rows make no progress.")
        time.sleep(0.005)
