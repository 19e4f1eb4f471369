"""Engines for replicas whose answers cost nothing: what is left is the way there and back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.instant import InstantEngine
from vdiff_kserve import loading
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.engine import (
    EngineStoppedError,
    EventSink,
    GenerationEvent,
    GenerationRequest,
    RoundObserver,
    RoundReport,
)
from vdiff_kserve.loading import LoadedModel, load_model

CHUNK_SECONDS = 0.02
"""Between two events of a paced answer, as between two rounds of an engine."""


class PacedEngine(InstantEngine):
    """Answers a chunk at a time, all requests in rounds of a thread, and stamps each with when it
    was sent.

    The stamp is `stats.queue_seconds`, on the clock of `time.monotonic`, which the processes of a
    machine share.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows: list[tuple[Iterator[GenerationEvent], EventSink]] = []

    def start(self) -> None:
        """Run a round every now and then."""
        super().start()
        threading.Thread(target=self._run_rounds, name="vdiff-engine", daemon=True).start()

    def post(
        self, requests: Sequence[GenerationRequest], sinks: Sequence[EventSink]
    ) -> list[Callable[[], None]]:
        """Take part from the next round on.

        Raises:
            EngineStoppedError: the engine is not running.
        """
        if not self.alive:
            raise EngineStoppedError("The engine is not running.")
        rows = [(self._events(r), sink) for r, sink in zip(requests, sinks, strict=True)]
        self._rows += rows
        return [partial(self._rows.remove, row) for row in rows]

    def _run_rounds(self) -> None:
        while self.alive:
            time.sleep(CHUNK_SECONDS)
            rows = list(self._rows)
            for row in rows:
                events, sink = row
                event = next(events)
                sink(replace(event, stats=replace(event.stats, queue_seconds=time.monotonic())))
                if event.finish_reason is not None:
                    self._rows.remove(row)
            if rows and self.config.observer is not None:
                self.config.observer(_report(len(rows)))


def _report(rows: int) -> RoundReport:
    """What a round of so many rows tells of itself."""
    return RoundReport(
        rows=rows,
        refreshes=0,
        reuses=rows,
        commits=0,
        auxiliary=0,
        committed=rows,
        accepted=(),
        block_steps=(),
        computed=rows,
        cached=0,
        attended=rows,
        plan_seconds=0.0,
        forward_seconds=CHUNK_SECONDS,
        sample_seconds=0.0,
        apply_seconds=0.0,
    )


def instant_model(config: ServerConfig, observer: RoundObserver | None = None) -> LoadedModel:
    """A model whose engine answers at once, with the whole answer in one event."""
    InstantEngine.tokens_per_chunk = config.default_max_tokens
    return _with_engine(InstantEngine, config, observer)


def paced_model(config: ServerConfig, observer: RoundObserver | None = None) -> LoadedModel:
    """A model whose engine answers a token at a time."""
    InstantEngine.tokens_per_chunk = 1
    return _with_engine(PacedEngine, config, observer)


def _with_engine(
    engine: type[InstantEngine], config: ServerConfig, observer: RoundObserver | None
) -> LoadedModel:
    own = loading.Engine
    loading.Engine = engine  # type: ignore[misc]
    try:
        return load_model(config, observer)
    finally:
        loading.Engine = own  # type: ignore[misc]
