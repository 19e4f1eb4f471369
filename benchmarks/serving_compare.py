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

from benchmarks.load import Load, closed_loop
from benchmarks.serving_engine import EngineRun

if TYPE_CHECKING:
    from benchmarks.serving import Benchmark

ALONE = 0
"""Stands for one request after the other, where others have their number of rows."""


@dataclass
class Turns:
    """What one level and its baseline did with the same requests, turn by turn."""

    served: list[Load] = field(default_factory=list)
    bare: list[EngineRun] = field(default_factory=list)

    def summary(self, rows: int, rate_alone: float) -> dict[str, Any]:
        """The figures as JSON.

        Args:
            rate_alone: tokens per second of one request after the other.
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
            "to_one_after_the_other": rate / rate_alone,
            "to_bare_engine": rate / bare,
            "to_bare_engine_by_turn": [rate_of([load]) / rate_of([run]) for load, run in pairs],
        }


def rate_of(runs: Sequence[Load] | Sequence[EngineRun]) -> float:
    """Tokens per second over all runs."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def compare(
    benchmark: Benchmark,
    server: tuple[str, int | None],
    decoding: dict[str, Any],
    on_answer: Callable[[int], object],
) -> dict[str, Any]:
    """The requests of the levels once more, and as both baselines answer them.

    Args:
        server: its address, and the tokens that it lets a round spend on whole passes.
        decoding: of the answers, as the server reports it.
        on_answer: told of answers as they come.
    """
    args = benchmark.args
    url, budget = server
    asked, warm_up = benchmark.prompts[: args.requests], benchmark.prompts[args.requests :]
    bare = benchmark.bare_engine(decoding, budget)
    levels = {rows: Turns() for rows in args.compare}
    alone: list[Load] = []
    with contextlib.ExitStack() as stack:
        single = args.base_url or stack.enter_context(benchmark.server(1)).url
        benchmark.warm_up(single)

        def ask(address: str, rows: int) -> Load:
            client = benchmark.client(address)
            return asyncio.run(closed_loop(client, asked, rows, lambda: on_answer(1)))

        for turn in range(args.turns):
            for rows in [*levels, ALONE][:: -1 if turn % 2 else 1]:
                if rows == ALONE:
                    alone.append(ask(single, 1))
                    continue
                if turn % 2 == 0:
                    levels[rows].served.append(ask(url, rows))
                levels[rows].bare.append(bare.run(asked, rows, warm_up))
                on_answer(len(asked))
                if turn % 2 == 1:
                    levels[rows].served.append(ask(url, rows))
    rate_alone = rate_of(alone)
    return {
        "turns": args.turns,
        "token_budget": bare.token_budget,
        "one_after_the_other": {
            "tokens": sum(load.tokens for load in alone),
            "tokens_per_second": rate_alone,
            "errors": sum(load.errors.total() for load in alone),
        },
        "levels": [
            turns.summary(rows, rate_alone) | {"batching": bare.gain(asked[: 2 * rows], rows)}
            for rows, turns in levels.items()
        ],
    }
