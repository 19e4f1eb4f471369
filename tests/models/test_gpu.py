"""On a GPU: the attention kernel, CUDA graphs and a round's transfers. Skipped without one."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F

from tests.engine.tiny import request_of, running, tiny_decoder, tiny_spec
from tests.models.test_attention import mixed_rows, store_for
from tests.models.test_reuse_graphs import PLACES, reuse_rows
from vdiff_kserve.engine import EngineConfig
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.engine.passes import Pass
from vdiff_kserve.models import (
    Decoder,
    ForwardBatch,
    KeyValueStore,
    ReuseGraphs,
    RowSpan,
    fused,
    fused_experts,
    split_attention,
)
from vdiff_kserve.models.attention import KERNEL_DTYPES, has_kernel
from vdiff_kserve.models.layers import RMSNorm
from vdiff_kserve.models.moe import MoEConfig, Router, has_expert_kernel
from vdiff_kserve.sampler import Constraints, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
T = TypeVar("T")
CUDA = torch.device("cuda", 0)
BFLOAT16 = dict(atol=0.25, rtol=0.05)
"""Hidden states have a variance of 1, and differ by up to 0.1 when only attention's order does."""


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    """Grouped heads of a size that the kernel takes, in bfloat16 on the GPU, as they are loaded."""
    made = tiny_decoder(head_dim=64, hidden_size=256).to(CUDA, torch.bfloat16)
    made.join_layers()
    assert has_kernel(made.device, made.dtype, 64)
    with torch.inference_mode():
        yield made


def on_gpu(store: KeyValueStore) -> KeyValueStore:
    return KeyValueStore(*(t.to(CUDA, torch.bfloat16) for t in (store.keys, store.values)))


@pytest.mark.parametrize("seed", range(5))
def test_the_kernel_computes_what_the_reference_computes(
    seed: int, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases, spans, places = mixed_rows(random.Random(seed))
    store = store_for(decoder, places)
    packed = decoder(ForwardBatch.pack(canvases, spans, on_gpu(store), CUDA))
    monkeypatch.setattr("vdiff_kserve.models.decoder.has_kernel", lambda *_: False)
    plain = decoder(ForwardBatch.pack(canvases, spans, on_gpu(store), CUDA))
    torch.testing.assert_close(packed, plain, **BFLOAT16)


def test_fused_kernels_are_used_and_right() -> None:
    """That Triton compiles them here; `fused.works` compares what they compute."""
    with torch.inference_mode():
        assert fused.agrees(CUDA)
        x = torch.randn(40, 4096, device=CUDA, dtype=torch.bfloat16)
        assert fused.usable(x)
        assert not fused.usable(x.float())
        for size in (4096, 128):
            rows = x.view(-1, size)
            norm = RMSNorm(size, 1e-5).to(CUDA, torch.bfloat16)
            plain = F.rms_norm(rows, (size,), None, norm.eps) * norm.weight
            torch.testing.assert_close(norm(rows), plain, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(("size", "group"), [(128, 1), (128, 7), (64, 2), (256, 4), (80, 1)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_attention_of_few_queries_is_right(size: int, group: int, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert split_attention.agrees(CUDA, dtype, size, group)


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True}, {"qk_norm": True, "rotary_dim": 32}], ids=str
)
def test_joined_layers_compute_what_they_compute_apart(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached blocks and whole canvases, with every kernel and with none; also what is cached."""
    made = tiny_decoder(head_dim=64, hidden_size=256, **changes).to(CUDA, torch.bfloat16)
    cases = [(reuse_rows(5, random.Random(0)), PLACES)]
    cases += [(rows, places) for *rows, places in (mixed_rows(random.Random(s)) for s in (4, 8))]
    results: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for is_joined in (False, True):
            if is_joined:
                monkeypatch.undo()
                made.join_layers()
            else:
                monkeypatch.setattr(fused, "usable", lambda _: False)
                monkeypatch.setattr(split_attention, "usable", lambda *_: False)
            states = []
            for (canvases, spans), places in cases:
                store = on_gpu(store_for(made, places))
                states.append(made(ForwardBatch.pack(canvases, spans, store, CUDA)))
                states += [store.keys, store.values]
            results.append(states)
    for apart, joined in zip(*results, strict=True):
        torch.testing.assert_close(joined, apart, **BFLOAT16)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(256, 8, 512, "sigmoid", True, 2.5, True, num_groups=8, groups_kept=4),
        MoEConfig(160, 6, 1536, scaling=16.0),
        MoEConfig(60, 4, 1408),
        MoEConfig(16, 1, 64),
    ],
    ids=str,
)
def test_kernels_of_experts_are_right(config: MoEConfig) -> None:
    with torch.inference_mode():
        assert fused_experts.agrees(CUDA, config), "they choose, lay out or sum otherwise"


def test_experts_take_their_kernels() -> None:
    with torch.inference_mode():
        x = torch.zeros((2, 256), device=CUDA, dtype=torch.bfloat16)
        assert fused_experts.usable(x, MoEConfig(256, 8, 512, num_groups=8, groups_kept=4))
        assert fused_experts.usable(x, MoEConfig(60, 4, 512))
        assert not fused_experts.usable(x, MoEConfig(60, 4, 500))
        assert not fused_experts.usable(x, MoEConfig(60, 4, 512, num_groups=6, groups_kept=4))


def test_tokens_are_drawn_by_the_kernel() -> None:
    with torch.inference_mode():
        assert draw.agrees(CUDA), "it draws other tokens than the plain operations"
        assert draw.usable(torch.zeros(2, 100, device=CUDA))


@pytest.mark.parametrize(("queries", "first", "outputs"), [(8, 0, 8), (9, 0, 8)])
def test_a_replayed_graph_computes_what_the_pass_computes(
    queries: int, first: int, outputs: int, decoder: Decoder
) -> None:
    graphs = ReuseGraphs.for_model(decoder, 96)
    assert graphs is not None
    rng, shared = random.Random(0), on_gpu(store_for(decoder, PLACES))
    for rows in (7, 5, 8, 1):
        canvases, spans = reuse_rows(rows, rng, queries, first, outputs)
        expected = decoder(ForwardBatch.pack(canvases, spans, shared, CUDA))
        replayed = graphs.run(canvases, spans, shared)
        assert replayed is not None, "the pass was not captured"
        torch.testing.assert_close(replayed, expected, **BFLOAT16)


def test_blocks_of_rows_that_see_none_after_them_are_computed_and_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of several blocks by the kernel for few queries, and the same blocks captured."""
    block, lengths = 32, (96, 64, 160)
    made = tiny_decoder(head_dim=64, hidden_size=256, attention_block=block)
    made = made.to(CUDA, torch.bfloat16)
    made.join_layers()
    canvases, spans, place = [], [], 3
    for length in lengths:
        start = 0 if length == 96 else length - 2 * block
        canvases.append(torch.randint(30, (length,)))
        spans.append(RowSpan(start, length - start, length, length - block, block, place))
        place += length
    row = make_row(request_of((1,), 30), lambda _: None, tiny_spec(made), False)
    parts = [
        part
        for canvas, span in zip(canvases, spans, strict=True)
        for part in Pass(row, False, canvas, span).by_block(block)
    ]
    stores = [on_gpu(store_for(made, place + 1)) for _ in range(3)]
    with torch.inference_mode():
        packed = made(ForwardBatch.pack(canvases, spans, stores[0], CUDA))
        graphs = ReuseGraphs.for_model(made, 200)
        assert graphs is not None
        assert graphs.takes_blocks == block
        captured = graphs.run(
            [each.canvas for each in parts], [each.span for each in parts], stores[1]
        )
        assert captured is not None, "the pass was not captured"
        monkeypatch.setattr("vdiff_kserve.models.decoder.has_kernel", lambda *_: False)
        plain = made(ForwardBatch.pack(canvases, spans, stores[2], CUDA))
    torch.testing.assert_close(packed, plain, **BFLOAT16)
    last = [i for i, part in enumerate(parts) if part.span.keys == len(part.canvas)]
    wanted = torch.cat([captured[i * block : (i + 1) * block] for i in last])
    torch.testing.assert_close(wanted, plain, **BFLOAT16)
    for store in stores[:2]:
        torch.testing.assert_close(store.keys[:, :-1], stores[2].keys[:, :-1], **BFLOAT16)


def test_a_replayed_whole_pass_computes_what_the_pass_computes(decoder: Decoder) -> None:
    graphs = ReuseGraphs.for_model(decoder, 96)
    assert graphs is not None
    rng, shared = random.Random(0), on_gpu(store_for(decoder, PLACES))
    for i, (length, first, outputs) in enumerate([(70, 8, 8), (65, 30, 20), (96, 0, 32)]):
        canvas = torch.tensor(rng.choices(range(30), k=length))
        span = RowSpan(0, length, length, first, outputs, 10)
        expected = decoder(ForwardBatch.pack([canvas], [span], shared, CUDA))
        replayed = graphs.run_whole(canvas, span, shared)
        assert (replayed is None) == (i == 0), "captured when its size comes again"
        if replayed is not None:
            torch.testing.assert_close(replayed, expected, **BFLOAT16)


def test_states_of_a_captured_pass_outlive_the_next_one(decoder: Decoder) -> None:
    """A pass that was captured before this one computes where this one's memory was free."""
    graphs = ReuseGraphs.for_model(decoder, 96)
    assert graphs is not None
    shared = on_gpu(store_for(decoder, PLACES))
    canvas, span = torch.arange(90) % 30, RowSpan(0, 90, 90, 0, 8, 100)
    for _ in range(2):
        graphs.run_whole(canvas, span, shared)
    canvases, spans = reuse_rows(3, random.Random(0))
    states = graphs.run(canvases, spans, shared)
    assert states is not None
    before = states.clone()
    assert graphs.run_whole(canvas, span, shared) is not None
    assert torch.equal(states, before)


def test_answers_in_float32_are_those_of_a_cpu() -> None:
    requests = [request_of((1, 2, 3 + i), 12 + 3 * i, cache="dual", seed=i) for i in range(5)]
    with running(tiny_decoder()) as engine:
        expected = [result.token_ids for result in engine.generate(requests)]
    with running(tiny_decoder().to(CUDA)) as engine:
        assert [result.token_ids for result in engine.generate(requests)] == expected


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"policy": "threshold", "threshold": 0.5},
        {"policy": "credit"},
        {"temperature": 0.7, "top_p": 0.9, "logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"top_logprobs": 2, "constraints": Constraints(bad_words=((5,),), repetition_penalty=1.2)},
        {"cache": "prefix", "cfg_scale": 1.5},
    ],
    ids=str,
)
def test_a_round_waits_for_the_gpu_once(decoding: dict, decoder: Decoder) -> None:
    """Each step is taken twice, since the first time it may capture a pass."""
    with running(decoder, EngineConfig(kv_cache_tokens=400)) as engine:
        engine.stop()
        runner, memory = engine._runner, engine._memory
        spec = tiny_spec(decoder)
        rows = []
        for i in range(4):
            request = request_of((1, 2, i), 24, **{"cache": "dual"} | decoding)
            rows.append(make_row(request, lambda _: None, spec, False))
            assert memory.reserve(rows[-1])
        for _ in range(4):
            runner.step(rows)
            decisions, waits = watched(lambda: runner.step(rows))
            assert len(waits) == 1, waits
            for row, decision in zip(rows, decisions, strict=True):
                row.apply(decision)


def watched(run: Callable[[], T]) -> tuple[T, list[str]]:
    """What `run` returns, and where it waited for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself
        told = len(caught)
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught[told:] if "called a synchronizing" in str(each.message)]
    return result, [f"{each.filename}:{each.lineno}" for each in waits]


@pytest.mark.parametrize("has_experts", [False, True])
def test_idle_places_take_nothing_from_what_memory_held_before(has_experts: bool) -> None:
    """All memory that a pass is given holds NaN. Sizes come as rows come and go, and some rows'
    places are idle."""
    if has_experts and not has_expert_kernel(CUDA, torch.bfloat16):
        pytest.skip("this GPU has no kernel for experts")
    experts = MoEConfig(64, 4, 64, "sigmoid", num_groups=8, groups_kept=4, shared_size=64)
    made = tiny_decoder(head_dim=64, hidden_size=256, moe=experts if has_experts else None)
    made = made.to(CUDA, torch.bfloat16)
    for module in made.modules():
        if isinstance(module, Router):
            module.float()
    made.join_layers()
    rng = random.Random(2)
    with torch.inference_mode():
        graphs = ReuseGraphs.for_model(made, 96)
        assert graphs is not None
        for rows in (5, 24, 40, 13, 1, 40, 33):
            canvases, spans = reuse_rows(rows, rng)
            store = on_gpu(store_for(made, 30 * rows))
            shared = KeyValueStore(store.keys.clone(), store.values.clone())
            expected = made(ForwardBatch.pack(canvases, spans, store, CUDA))
            torch.cuda.synchronize()
            graphs._captured.clear()
            poison()
            for _ in range(2):
                replayed = graphs.run(canvases, spans, shared)
                assert replayed is not None, "the pass was not captured"
                error = (replayed - expected).abs().float().mean()
                assert error < 0.1, "a few tokens may choose other experts"
            idle = graphs._captured[next(iter(graphs._captured))]._output
            assert idle.isfinite().all()


def test_many_replays_of_many_experts_stay_right() -> None:
    """Other rows each time, so that other experts have tokens, by several passes in turn."""
    if not has_expert_kernel(CUDA, torch.bfloat16):
        pytest.skip("this GPU has no kernel for experts")
    experts = MoEConfig(256, 8, 64, "sigmoid", True, 2.5, True, num_groups=8, groups_kept=4)
    made = tiny_decoder(head_dim=64, hidden_size=256, moe=experts).to(CUDA, torch.bfloat16)
    for module in made.modules():
        if isinstance(module, Router):
            module.float()
    made.join_layers()
    rng = random.Random(1)
    with torch.inference_mode():
        graphs = ReuseGraphs.for_model(made, 96)
        assert graphs is not None
        shared = on_gpu(store_for(made, 30 * 40))
        for _ in range(30):
            for rows in (24, 40, 8):
                canvases, spans = reuse_rows(rows, rng)
                expected = made(ForwardBatch.pack(canvases, spans, shared, CUDA))
                replayed = graphs.run(canvases, spans, shared)
                assert replayed is not None, "the pass was not captured"
                error = (replayed - expected).abs().float().mean()
                assert error < 0.1, "a few tokens may choose other experts"


def poison() -> None:
    """Fill memory that is free with NaN, as far as torch gives it out again."""
    sizes = [1 << bits for bits in range(8, 28)] * 4
    kept = [torch.full((size,), torch.nan, device=CUDA) for size in sizes]
    torch.cuda.synchronize()
    del kept


def test_experts_are_computed_and_captured() -> None:
    """Against the same weights in float32 on the CPU."""
    if not has_expert_kernel(CUDA, torch.bfloat16):
        pytest.skip("this GPU has no kernel for experts")
    experts = MoEConfig(num_experts=4, experts_per_token=2, expert_size=64, shared_size=64)
    on_cpu = tiny_decoder(head_dim=64, hidden_size=256, moe=experts)
    there = copy.deepcopy(on_cpu).to(CUDA, torch.bfloat16)
    for own, module in zip(on_cpu.modules(), there.modules(), strict=True):
        if isinstance(module, Router):
            module.float().load_state_dict(own.state_dict())
    with torch.inference_mode():
        graphs = ReuseGraphs.for_model(there, 96)
        assert graphs is not None
        store = store_for(on_cpu, PLACES)
        shared = on_gpu(store)
        for rows in (3, 4):
            canvases, spans = reuse_rows(rows, random.Random(rows), 8, 0, 8)
            expected = on_cpu(ForwardBatch.pack(canvases, spans, store))
            replayed = graphs.run(canvases, spans, shared)
            assert replayed is not None, "the pass was not captured"
            error = (replayed.float().cpu() - expected).abs().mean()
            assert error < 0.1, "a few tokens may choose other experts"
