"""A level of the load beside two baselines: one request at a time, and the engine without a server.

A machine that shares its host changes its speed from one minute to the next, so the ways to ask
take turns, each time in the opposite order, and what counts is the sum over all turns.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.load import Load, Prompt, closed_loop
from benchmarks.serving_engine import BareEngine, EngineRun

if TYPE_CHECKING:
    from benchmarks.serving import Benchmark

ALONE = 0
"""Stands for one request after the other, where others have their number of rows."""


@dataclass
class Turns:
    """What one level and its baseline did with the same requests, turn by turn."""

    served: list[Load] = field(default_factory=list)
    bare: list[EngineRun] = field(default_factory=list)

    def summary(self, rows: int, rate_alone: float | None) -> dict[str, Any]:
        """The figures as JSON.

        Args:
            rate_alone: tokens per second of one request after the other; None if not measured.
        """
        rate, bare = rate_of(self.served), rate_of(self.bare)
        pairs = zip(self.served, self.bare, strict=True)
        return {
            "concurrency": rows,
            "tokens_per_second": rate,
            "engine_tokens_per_second": bare,
            "errors": sum(load.errors.total() for load in self.served),
            "forward_passes": sum(each.passes for load in self.served for each in load.whole),
            "engine_forward_passes": sum(run.passes for run in self.bare),
            "engine_bookkeeping": sum(run.bookkeeping * run.seconds for run in self.bare)
            / sum(run.seconds for run in self.bare),
            "to_one_after_the_other": None if rate_alone is None else rate / rate_alone,
            "to_bare_engine": rate / bare,
            "to_bare_engine_by_turn": [rate_of([load]) / rate_of([run]) for load, run in pairs],
        }


def rate_of(runs: Sequence[Load] | Sequence[EngineRun]) -> float:
    """Tokens per second over all runs."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def alone_prompts(benchmark: Benchmark) -> list[Prompt]:
    """What is asked one after the other: the requests of the shortest level."""
    if benchmark.args.engine_only:
        return []
    return min((benchmark.prompts(rows) for rows in benchmark.args.compare), key=len)


def requests_to_compare(benchmark: Benchmark) -> int:
    """How many answers `compare` will wait for."""
    args = benchmark.args
    paired = 2 * sum(len(benchmark.prompts(rows)) for rows in args.compare)
    turn = paired + len(alone_prompts(benchmark))
    return int(args.turns * turn)


class Contest:
    """The ways to answer the same requests, which take turns.

    Args:
        bare: the engine without a server.
        url: of the server; `single_url`, of one that is asked one request after the other.
        on_answer: told of answers as they come.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        bare: BareEngine,
        url: str,
        single_url: str,
        on_answer: Callable[[int], object],
    ) -> None:
        self._benchmark = benchmark
        self._bare = bare
        self._url, self._single_url = url, single_url
        self._on_answer = on_answer
        self._singly = alone_prompts(benchmark)
        self.levels = {rows: Turns() for rows in benchmark.args.compare}
        self.alone: list[Load] = []

    def take_turns(self, order: int) -> None:
        """Answer everything once in every way, forwards (1) or backwards (-1)."""
        ways = [*self.levels, ALONE] if self._singly else list(self.levels)
        for rows in ways[::order]:
            if rows == ALONE:
                self.alone.append(self._ask(self._single_url, 1, self._singly))
                continue
            for way in (self._serve, self._run_bare)[::order]:
                way(rows)

    def batching(self, rows: int) -> float | None:
        """What computing rows together gains; None when only rates are wanted."""
        if self._benchmark.args.engine_only:
            return None
        return self._bare.gain(self._benchmark.prompts(rows)[: 2 * rows], rows)

    def _serve(self, rows: int) -> None:
        load = self._ask(self._url, rows, self._benchmark.prompts(rows))
        self.levels[rows].served.append(load)

    def _run_bare(self, rows: int) -> None:
        prompts = self._benchmark.prompts(rows)
        run = self._bare.run(prompts, rows, self._benchmark.warm_up_prompts)
        self.levels[rows].bare.append(run)
        self._on_answer(len(prompts))

    def _ask(self, url: str, rows: int, prompts: Sequence[Prompt]) -> Load:
        client = self._benchmark.client(url)
        return asyncio.run(closed_loop(client, prompts, rows, lambda: self._on_answer(1)))


def compare(
    benchmark: Benchmark,
    server: tuple[str, int | None],
    decoding: dict[str, Any],
    on_answer: Callable[[int], object],
) -> dict[str, Any]:
    """The requests of the levels once more, and as the baselines answer them.

    Args:
        server: its address, and the tokens that it lets a round spend on whole passes.
        decoding: of the answers, as the server reports it.
        on_answer: told of answers as they come.
    """
    args = benchmark.args
    url, budget = server
    bare = benchmark.bare_engine(decoding, budget)
    with contextlib.ExitStack() as stack:
        single = url
        if not args.base_url and not args.engine_only:
            single = stack.enter_context(benchmark.server(1)).url
            benchmark.warm_up(single)
        contest = Contest(benchmark, bare, url, single, on_answer)
        for turn in range(args.turns):
            contest.take_turns(-1 if turn % 2 else 1)
    alone = contest.alone
    rate_alone = rate_of(alone) if alone else None
    return {
        "turns": args.turns,
        "token_budget": bare.token_budget,
        "one_after_the_other": {
            "tokens": sum(load.tokens for load in alone),
            "tokens_per_second": rate_alone,
            "errors": sum(load.errors.total() for load in alone),
        },
        "levels": [
            turns.summary(rows, rate_alone) | {"batching": contest.batching(rows)}
            for rows, turns in contest.levels.items()
        ],
    }
