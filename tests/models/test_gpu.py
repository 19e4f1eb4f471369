"""On a GPU: the attention kernel, CUDA graphs and a round's transfers. Skipped without one."""

import random
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.engine.tiny import request_of, running, tiny_decoder, tiny_spec
from tests.models.test_attention import mixed_rows, store_for
from tests.models.test_reuse_graphs import PLACES, reuse_rows
from vdiff_kserve.engine import EngineConfig
from vdiff_kserve.models import Decoder, ForwardBatch, KeyValueStore, ReuseGraphs
from vdiff_kserve.models.attention import has_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = torch.device("cuda", 0)
BFLOAT16 = dict(atol=0.1, rtol=0.05)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    """Grouped heads of a size that the kernel takes, in bfloat16 on the GPU."""
    made = tiny_decoder(head_dim=64, hidden_size=256).to(CUDA, torch.bfloat16)
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


def test_answers_in_float32_are_those_of_a_cpu() -> None:
    requests = [request_of((1, 2, 3 + i), 12 + 3 * i, cache="dual", seed=i) for i in range(5)]
    with running(tiny_decoder()) as engine:
        expected = [result.token_ids for result in engine.generate(requests)]
    with running(tiny_decoder().to(CUDA)) as engine:
        assert [result.token_ids for result in engine.generate(requests)] == expected


@pytest.mark.parametrize("decoding", [{}, {"policy": "threshold", "threshold": 0.5}])
def test_a_round_waits_for_the_gpu_once(decoding: dict, decoder: Decoder) -> None:
    from vdiff_kserve.engine.make_row import make_row

    with running(decoder, EngineConfig(kv_cache_tokens=400)) as engine:
        engine.stop()
        runner, memory = engine._runner, engine._memory
        spec = tiny_spec(decoder)
        rows = []
        for i in range(4):
            request = request_of((1, 2, i), 24, cache="dual", **decoding)
            rows.append(make_row(request, lambda _: None, spec, False))
            assert memory.reserve(rows[-1])
        for _ in range(3):
            for row, decision in zip(rows, runner.step(rows), strict=True):
                row.apply(decision)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                runner.step(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
        assert len(waits) <= 1, waits
