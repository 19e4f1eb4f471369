"""Who runs when: priorities, deadlines, and the token budget of a round."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tests.engine.tiny import (
    GatedDecoder,
    generate,
    request_of,
    running,
    tiny_decoder,
)
from tests.waiting import wait_until
from vdiff_kserve.engine import (
    EngineConfig,
    GenerationStream,
    QueueTimeoutError,
    RequestTimeoutError,
    RoundReport,
    measured_token_budget,
)

DECODER = tiny_decoder().double()


async def finish(stream: GenerationStream) -> None:
    async for _ in stream:
        pass


async def test_lower_priority_numbers_go_first_and_equal_ones_in_order_of_arrival() -> None:
    gated = GatedDecoder.around(DECODER)
    finished: list[int] = []
    with running(gated, EngineConfig(max_num_seqs=1)) as engine:
        (first,) = engine.submit([request_of(prompt=(9,), max_tokens=1)])
        wait_until(lambda: gated.waiting == 1)
        priorities = [0, 5, -3, 0, -3]
        streams = engine.submit(
            [
                replace(request_of(prompt=(i,), max_tokens=1), priority=priority)
                for i, priority in enumerate(priorities)
            ]
        )
        for watched in engine.watched:
            sink, prompt = watched.row.sink, watched.row.request.prompt_ids
            watched.row.sink = lambda event, sink=sink, prompt=prompt: (
                finished.append(prompt[0]),
                sink(event),
            )
        gated.allow(6)
        for stream in [first, *streams]:
            await finish(stream)
    assert finished == [9, 2, 4, 0, 3, 1]


async def test_deadline_in_the_queue_and_while_running() -> None:
    """Both are told apart, their places are free at once, and the others go on."""
    gated = GatedDecoder.around(DECODER)
    config = EngineConfig(max_num_seqs=1, max_queue=2)
    with running(gated, config) as engine:
        late = replace(request_of(max_tokens=24), deadline=time.monotonic() + 0.5)
        (ran,) = engine.submit([late])
        wait_until(lambda: gated.waiting == 1)
        (waited,) = engine.submit([late])
        (patient,) = engine.submit([request_of(max_tokens=8)])
        wait_until(lambda: time.monotonic() > late.deadline)
        gated.allow(100)
        with pytest.raises(RequestTimeoutError, match="before its answer was complete"):
            await finish(ran)
        with pytest.raises(QueueTimeoutError, match="before it got a place"):
            await finish(waited)
        await finish(patient)
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)
    passes = [len(watched.steps) for watched in engine.watched]
    assert passes[:2] == [1, 0], "a row ran after its time was over"


def test_deadline_that_is_met_changes_nothing() -> None:
    request = request_of(max_tokens=8)
    hurried = replace(request, deadline=time.monotonic() + 600)
    assert generate(DECODER, hurried) == generate(DECODER, request)


def watch_rounds(config: EngineConfig, *requests, decoder=DECODER):
    """Run requests; their results and every round's report."""
    reports: list[RoundReport] = []
    with running(decoder, replace(config, observer=reports.append)) as engine:
        return engine.generate(requests), reports, engine


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
def test_results_do_not_depend_on_the_budget(cache: str, budget: int) -> None:
    requests = [
        request_of(prompt=(i,) * (1 + 9 * i), max_tokens=12, cache=cache, seed=i, cfg_scale=i % 2)
        for i in range(6)
    ]
    alone = [generate(DECODER, request)[0] for request in requests]
    results, _, engine = watch_rounds(EngineConfig(max_num_batched_tokens=budget), *requests)
    assert results == alone
    assert engine.kv_tokens_used == 0


def test_whole_passes_of_a_round_stay_within_the_budget() -> None:
    requests = [request_of(prompt=(i,) * 8, max_tokens=12, cache="none") for i in range(6)]
    _, reports, _ = watch_rounds(EngineConfig(max_num_batched_tokens=40), *requests)
    assert max(report.computed for report in reports) == 40
    assert {report.rows for report in reports} == {2}, "rows of 20 tokens, two to a round"


def test_rows_that_wait_for_the_budget_take_turns() -> None:
    requests = [request_of(prompt=(i,) * 8, max_tokens=12, cache="none") for i in range(6)]
    _, _, engine = watch_rounds(EngineConfig(max_num_batched_tokens=40), *requests)
    assert engine.num_steps == 6 * 12 / 2
    last = [watched.row.last_round for watched in engine.watched]
    assert max(last) - min(last) == 2, "some row was left behind"


def test_reuse_rows_run_in_every_round_beside_a_long_refresh() -> None:
    """A prompt far beyond the budget runs a layer at a time; the others step in each round."""
    decoder = tiny_decoder(num_layers=6).double()
    reports: list[RoundReport] = []
    config = EngineConfig(max_num_batched_tokens=20, observer=reports.append)
    long = request_of(prompt=(5,) * 60, max_tokens=8, cache="dual")
    short = request_of(prompt=(3,), max_tokens=30, cache="dual", block_length=30)
    with running(decoder, config) as engine:
        together = engine.generate([short, long])
    long_row = engine.watched[1]
    assert together == [generate(decoder, request)[0] for request in (short, long)]
    assert len(long_row.steps) == 8
    before = [r for r in reports if r.refreshes == 0]
    assert len(before) >= 6, "the long pass held up the short row"
    assert all(report.forward_seconds > 0 for report in reports)
    assert long_row.row.stats.refreshes == 1


def test_row_that_is_aborted_between_the_slices_of_a_pass_is_gone() -> None:
    decoder = tiny_decoder(num_layers=6).double()
    config = EngineConfig(max_num_batched_tokens=1)
    with running(decoder, config) as engine:
        inbox: list[object] = []
        row = engine.make_row(
            request_of(prompt=(5,) * 60, max_tokens=8, cache="dual"), inbox.append
        )
        engine._scheduler.submit([row])
        wait_until(lambda: row.begun_pass is not None or row.finish_reason is not None)
        engine._scheduler.abort(row)
        wait_until(lambda: engine.num_running == 0)
        assert row.begun_pass is None
        assert engine.kv_tokens_used == 0


def refuse_long_passes(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if len(inputs[0]) > 40:
        raise RuntimeError("too long")


def test_failure_in_a_slice_fails_that_row_alone() -> None:
    decoder = tiny_decoder(num_layers=4).double()
    decoder.layers[1].register_forward_pre_hook(refuse_long_passes)
    config = EngineConfig(max_num_batched_tokens=8)
    with running(decoder, config) as engine:
        outcomes: dict[str, list[object]] = {"long": [], "short": []}
        rows = [
            engine.make_row(request_of(prompt=(1,) * n, max_tokens=8), outcomes[name].append)
            for name, n in (("long", 60), ("short", 3))
        ]
        engine._scheduler.submit(rows)
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)
    assert "failed on this request" in str(outcomes["long"][-1])
    assert outcomes["short"][-1].finish_reason == "length"
    assert engine.failure is None


def test_measured_budget_is_a_round_number_within_bounds() -> None:
    budget = measured_token_budget(DECODER, 96)
    assert budget % 64 == 0
    assert 256 <= budget <= 16384


def test_report_of_a_round_says_what_happened() -> None:
    requests = [request_of(prompt=(i,), max_tokens=12, cache="dual") for i in range(3)]
    results, reports, _ = watch_rounds(EngineConfig(), *requests)
    assert sum(report.refreshes for report in reports) == sum(r.stats.refreshes for r in results)
    assert sum(report.reuses for report in reports) == sum(r.stats.reuses for r in results)
    assert sum(report.committed for report in reports) == 36
    assert sorted(steps for report in reports for steps in report.block_steps) == [4] * 3 + [8] * 3
    assert all(report.cached == 0 for report in reports if report.reuses == 0)
    assert any(report.cached > 0 for report in reports)
    assert all(
        min(r.plan_seconds, r.forward_seconds, r.sample_seconds, r.apply_seconds) >= 0
        for r in reports
    )
