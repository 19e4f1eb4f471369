"""Captured passes: the right rows in the right places. A recorder that runs the pass anew stands
for the GPU's; the tests marked `gpu` capture for real."""

import logging
import random
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tests.device import pack
from tests.engine.tiny import request_of, running, tiny_decoder, tiny_spec
from tests.models.test_attention import TOLERANCE, store_for, use_packed
from vdiff_kserve.engine import EngineConfig
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.engine.passes import MOST_BLOCKS, Pass, by_blocks
from vdiff_kserve.models import (
    ForwardBatch,
    KeyValueStore,
    ReuseGraphs,
    RowSpan,
    reuse_graphs,
    split_attention,
)
from vdiff_kserve.models.reuse_graphs import LONGEST, LONGEST_WHOLE, MOST_ROWS, bucket_of

PLACES = 200


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU; `use_packed` puts plain ones in their place."""
    monkeypatch.setattr(split_attention, "takes", lambda *_: False)


def run_again(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    output = run()
    return output, lambda: output.copy_(run())


def reuse_rows(
    count: int, rng: random.Random, queries: int = 8, first: int = 0, outputs: int = 8
) -> tuple[list[Tensor], list[RowSpan]]:
    canvases, spans, place = [], [], 0
    for _ in range(count):
        length = rng.randint(10, 20)
        start = rng.randint(0, length - queries)
        canvases.append(torch.tensor(rng.choices(range(30), k=length)))
        place += rng.randint(0, 3)
        spans.append(RowSpan(start, queries, length, start + first, outputs, place))
        place += length
    return canvases, spans


def graphs_of(decoder: torch.nn.Module, record: Callable = run_again) -> ReuseGraphs:
    return ReuseGraphs(decoder, 96, record)


@pytest.mark.parametrize(("queries", "first", "outputs"), [(8, 0, 8), (9, 0, 8), (8, 2, 1)])
@torch.inference_mode()
def test_captured_passes_equal_plain_ones(
    queries: int, first: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several passes of one shape, so that the second finds what the first left in its tensors."""
    decoder, rng = tiny_decoder(), random.Random(3)
    cases = [reuse_rows(n, rng, queries, first, outputs) for n in (7, 5, 8, 1, 1)]
    stores = [store_for(decoder, PLACES, seed) for seed in range(len(cases))]
    expected = [
        decoder(pack(*case, KeyValueStore(store.keys.clone(), store.values.clone())))
        for case, store in zip(cases, stores, strict=True)
    ]
    use_packed(monkeypatch)
    graphs = graphs_of(decoder)
    shared = KeyValueStore(torch.zeros_like(stores[0].keys), torch.zeros_like(stores[0].values))
    for (canvases, spans), store, states in zip(cases, stores, expected, strict=True):
        shared.keys.copy_(store.keys)
        shared.values.copy_(store.values)
        captured = graphs.run(canvases, spans, shared)
        torch.testing.assert_close(captured, states, **TOLERANCE)
    assert len(graphs._captured) == 2, "one pass of eight rows, one of one"


@torch.inference_mode()
def test_idle_places_of_a_captured_pass_leave_other_rows_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = tiny_decoder()
    use_packed(monkeypatch)
    store = store_for(decoder, PLACES)
    before = store.keys.clone()
    canvases, spans = reuse_rows(3, random.Random(0))
    graphs_of(decoder).run(canvases, spans, store)
    written = (store.keys != before).any(0).any(-1).any(-1).nonzero().squeeze(-1).tolist()
    own = [
        place
        for span in spans
        for place in range(span.cache_offset + span.start, span.cache_offset + span.start + 8)
    ]
    assert set(written) <= {*own, PLACES - 1}


@pytest.mark.parametrize("whole", [False, True])
@torch.inference_mode()
def test_idle_places_of_a_captured_pass_are_computed_from_numbers(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel leaves of tokens of no sequence may be anything; experts are chosen by it, and
    from none of that can they be. Here it would be NaN."""
    decoder = tiny_decoder()
    calls = use_packed(monkeypatch)
    store = store_for(decoder, PLACES)
    states: list[Tensor] = []

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        states.append(run())
        return states[0], lambda: states.append(run())

    graphs = graphs_of(decoder, record)
    canvases, spans = reuse_rows(3, random.Random(0))
    if whole:
        span = RowSpan(0, 20, 20, 5, 7, 10)
        assert graphs.run_whole(torch.arange(20), span, store) is None
        assert graphs.run_whole(torch.arange(20), span, store) is not None
    else:
        assert graphs.run(canvases, spans, store) is not None
    assert len(states) == 2
    assert all(each.isfinite().all() for each in states)
    assert all(call.cu_queries[-1] == 32 for call in calls)


def test_the_most_frequent_shape_is_captured_in_the_order_of_the_cache() -> None:
    spans = [
        RowSpan(0, 20, 20, 0, 8, 300),  # a refresh
        RowSpan(8, 8, 20, 8, 8, 200),
        RowSpan(8, 4, 20, 8, 4, 250),  # a short last block
        RowSpan(0, 8, 20, 0, 8, 0),
        RowSpan(0, 8, 8, 0, 8),  # no cache
    ]
    assert graphs_of(tiny_decoder()).choose(spans) == [3, 1]
    assert graphs_of(tiny_decoder()).choose([spans[0], spans[4]]) == []
    two_blocks = [RowSpan(4, 8, 12, 8, 4, 0)]
    assert graphs_of(tiny_decoder(attention_block=4)).choose(two_blocks) == []


def test_blocks_of_a_row_are_rows_of_a_captured_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's first block too, though it sees nothing but itself. Without the kernel that takes
    keys in any order there are none."""
    row = make_row(request_of((1,), 30), lambda _: None, tiny_spec(tiny_decoder()), False)
    spans = [
        RowSpan(8, 4, 12, 8, 4, 100),
        RowSpan(0, 12, 12, 8, 4, 50),
        RowSpan(4, 8, 12, 8, 4, 0),
    ]
    decoder = tiny_decoder(attention_block=4)
    assert graphs_of(decoder).takes_blocks is None
    assert graphs_of(decoder).choose(spans) == [0]
    use_packed(monkeypatch)
    graphs = graphs_of(decoder)
    parts = [part.span for span in spans for part in Pass(row, False, row.canvas, span).by_block(4)]
    assert [(part.start, part.keys) for part in parts] == [
        (8, 12), (0, 4), (4, 8), (8, 12), (4, 8), (8, 12)
    ]  # fmt: skip
    assert graphs.takes_blocks == 4
    assert graphs.choose(parts) == [4, 5, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "span",
    [
        RowSpan(4, 8, 12, 8, 4),  # no cache
        RowSpan(4, 8, 12, 7, 4, 0),  # wants another block's last state
        RowSpan(4, 8, 12, 4, 8, 0),  # wants two blocks'
        RowSpan(2, 10, 12, 8, 4, 0),
        RowSpan(0, 4 * MOST_BLOCKS + 4, 4 * MOST_BLOCKS + 4, 4 * MOST_BLOCKS, 4, 0),
    ],
)
def test_other_passes_are_not_taken_apart(span: RowSpan) -> None:
    row = make_row(request_of((1,), 30), lambda _: None, tiny_spec(tiny_decoder()), False)
    whole = Pass(row, False, row.canvas, span)
    assert whole.by_block(4) == [whole]


def test_passes_are_taken_apart_as_far_as_a_captured_pass_has_rows() -> None:
    row = make_row(request_of((1,), 30), lambda _: None, tiny_spec(tiny_decoder()), False)
    prompt, step = RowSpan(0, 12, 12, 8, 4, 0), RowSpan(8, 4, 12, 8, 4, 50)
    passes = [Pass(row, False, row.canvas, span) for span in (step, prompt, prompt, step)]
    for most, queries in ((8, [4] * 8), (7, [4, 4, 4, 4, 12, 4]), (3, [4, 12, 12, 4])):
        assert [part.span.queries for part in by_blocks(passes, 4, most)] == queries


def test_long_passes_are_not_captured() -> None:
    """The shape that is captured is the more seldom one."""
    spans = [RowSpan(8, LONGEST + 1, 900, 8, 8, 0), RowSpan(8, LONGEST + 1, 900, 8, 8, 1000)]
    spans.append(RowSpan(8, LONGEST, 900, 8, 8, 2000))
    assert graphs_of(tiny_decoder()).choose(spans) == [2]


@pytest.mark.parametrize("cached", [False, True])
@torch.inference_mode()
def test_captured_whole_passes_equal_plain_ones(
    cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the keys and values that they leave. A length is captured when it comes again."""
    decoder, rng = tiny_decoder(), random.Random(5)
    use_packed(monkeypatch)
    graphs, shared = graphs_of(decoder), store_for(decoder, PLACES)
    for length, first, outputs in ((20, 8, 8), (32, 0, 32), (17, 5, 12), (31, 0, 31), (9, 0, 1)):
        canvas = torch.tensor(rng.choices(range(30), k=length))
        span = RowSpan(0, length, length, first, outputs, 40 if cached else None)
        plain = store_for(decoder, PLACES)
        expected = decoder(pack([canvas], [span], plain if cached else None))
        states = graphs.run_whole(canvas, span, shared)
        if length in (20, 32):
            assert states is None, "the first of its size"
            continue
        torch.testing.assert_close(states, expected, **TOLERANCE)
        if cached:
            own = slice(40, 40 + length)
            torch.testing.assert_close(shared.keys[:, own], plain.keys[:, own], **TOLERANCE)
            torch.testing.assert_close(shared.values[:, own], plain.values[:, own], **TOLERANCE)
        assert torch.equal(shared.keys[:, :40], plain.keys[:, :40]), "of other rows"
    assert len(graphs._captured) == 2


@torch.inference_mode()
def test_states_of_a_captured_pass_outlive_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share memory: what one computes may lie where another, captured before, computes."""
    decoder, rng = tiny_decoder(), random.Random(5)
    use_packed(monkeypatch)
    (canvases, spans), store = reuse_rows(2, rng), store_for(decoder, PLACES)
    canvas, span = torch.arange(20), RowSpan(0, 20, 20, 0, 8, 150)
    expected = decoder(pack(canvases, spans, store))
    forward, computed = decoder.forward, list[Tensor]()

    def share_memory(batch: ForwardBatch) -> Tensor:
        for each in computed:
            each.fill_(torch.nan)
        computed.append(forward(batch))
        return computed[-1]

    monkeypatch.setattr(decoder, "forward", share_memory)
    graphs = graphs_of(decoder)
    assert graphs.run_whole(canvas, span, store) is None
    assert graphs.run_whole(canvas, span, store) is not None
    states = graphs.run(canvases, spans, store)
    assert graphs.run_whole(canvas, span, store) is not None
    torch.testing.assert_close(states, expected, **TOLERANCE)


def test_whole_passes_that_are_long_or_need_a_mask_are_not_captured() -> None:
    def runs(length: int, block: int | None = None) -> bool:
        graphs = graphs_of(tiny_decoder(attention_block=block), Mock(side_effect=AssertionError))
        for _ in range(3):
            span = RowSpan(0, length, length, 0, 4)
            assert graphs.run_whole(torch.zeros(length).long(), span, store) is None
        return graphs.failed  # at the attempt

    store = store_for(tiny_decoder(), PLACES)
    assert runs(LONGEST_WHOLE)
    assert not runs(LONGEST_WHOLE + 1)
    assert not runs(8, block=4)
    assert runs(4, block=4)


@torch.inference_mode()
def test_the_pass_not_used_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    use_packed(monkeypatch)
    monkeypatch.setattr(reuse_graphs, "MAX_GRAPHS", 2)
    decoder, rng = tiny_decoder(), random.Random(0)
    graphs, store = graphs_of(decoder), store_for(decoder, PLACES)
    for rows in (1, 2, 1, 4):
        graphs.run(*reuse_rows(rows, rng), store)
    assert [shape.rows for shape in graphs._captured] == [1, 4]


def test_rows_are_rounded_up_to_few_sizes() -> None:
    sizes = [bucket_of(rows) for rows in range(1, MOST_ROWS + 1)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 4, *range(8, 65, 8), 80, 96, 112, 128]


def test_passes_of_very_many_rows_are_not_captured() -> None:
    spans = [RowSpan(8, 8, 20, 8, 8, 20 * i) for i in range(MOST_ROWS + 1)]
    graphs = graphs_of(tiny_decoder())
    assert graphs.choose(spans) == []
    assert graphs.choose(spans[1:]) == list(range(MOST_ROWS))
    assert graphs.sizes(500)[-1] == MOST_ROWS


def test_a_pass_that_cannot_be_captured_is_told_once_and_runs_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(run: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = graphs_of(tiny_decoder(), fail)
    store = store_for(tiny_decoder(), PLACES)
    canvases, spans = reuse_rows(2, random.Random(0))
    with caplog.at_level(logging.WARNING):
        assert graphs.run(canvases, spans, store) is None
        assert graphs.choose(spans) == []
        assert graphs.run(canvases, spans, store) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted" in caplog.text


def failing_capture(_: object) -> None:
    """As a capture that is broken off for want of memory raises."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    finally:
        raise RuntimeError("capture was invalidated")


@torch.inference_mode()
def test_want_of_memory_leaves_captured_passes_and_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_packed(monkeypatch)
    monkeypatch.setattr(reuse_graphs, "PAUSE", 2)
    record = Mock(side_effect=[run_again, failing_capture, run_again])
    decoder, rng = tiny_decoder(), random.Random(0)
    graphs = graphs_of(decoder, lambda run: record()(run))
    store = store_for(decoder, PLACES)
    one, four = reuse_rows(1, rng), reuse_rows(4, rng)
    assert graphs.run(*one, store) is not None
    for _ in range(3):
        assert graphs.run(*four, store) is None
        assert graphs.run(*one, store) is not None
    assert graphs.run(*four, store) is not None
    assert record.call_count == 3
    assert len(caplog.records) == 1


def test_models_on_a_cpu_have_no_graphs() -> None:
    assert ReuseGraphs.for_model(tiny_decoder(), 96) is None


@pytest.mark.parametrize(
    ("shifted", "eager", "rows"),
    [(False, False, 8), (True, False, 8), (False, True, 8), (True, False, 1)],
)
def test_the_engine_answers_the_same_with_captured_passes(
    shifted: bool, eager: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several shapes: refreshes, cached blocks, short last blocks, guidance, no cache."""
    requests = [
        request_of(tuple(range(1, 2 + i)), 12 + 5 * i, cache=cache, cfg_scale=scale, seed=i)
        for i, (cache, scale) in enumerate(
            [("dual", 0.0), ("dual", 0.0), ("prefix", 0.0), ("dual", 1.5), ("none", 0.0)]
        )
    ]
    decoder = tiny_decoder()
    with running(decoder, shifted=shifted) as engine:
        expected = engine.generate(requests)
    use_packed(monkeypatch)
    captured: list[ReuseGraphs] = []
    config = EngineConfig(enforce_eager=eager, max_num_seqs=rows)

    def for_model(decoder: torch.nn.Module, longest: int) -> ReuseGraphs:
        captured.append(ReuseGraphs(decoder, longest, run_again))
        return captured[-1]

    monkeypatch.setattr(ReuseGraphs, "for_model", for_model)
    with running(decoder, config, shifted=shifted) as engine:
        assert engine.generate(requests) == expected
    assert bool(captured) != eager
    for each in captured:
        kinds = {shape.is_cached for shape in each._captured}
        assert True in kinds, "no cached pass was captured"
        assert rows > 1 or False in kinds, "no whole pass was captured"


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_an_engine_of_a_block_causal_model_runs_captured_passes_only(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, blocks whose keys and values become final in the next one's first pass, and steps of
    blocks, in one captured pass a round."""
    requests = [
        request_of(tuple(range(1, 2 + 3 * i)), 20 + 3 * i, cache="exact", seed=i) for i in range(6)
    ]
    decoder = tiny_decoder(attention_block=8)
    with running(decoder) as engine:
        expected = [result.token_ids for result in engine.generate(requests)]
    use_packed(monkeypatch)
    monkeypatch.setattr(
        ReuseGraphs, "for_model", lambda decoder, longest: ReuseGraphs(decoder, longest, run_again)
    )
    with running(decoder, EngineConfig(max_num_seqs=rows)) as engine:
        monkeypatch.setattr(engine._runner, "_pack", Mock(side_effect=AssertionError))
        assert [result.token_ids for result in engine.generate(requests)] == expected
