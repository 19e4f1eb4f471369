"""Linear layers in fp8 on a GPU that multiplies it. Skipped without one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.tiny import request_of, running, tiny_decoder
from tests.models.folders import CONFIG, tensors_of, write_single
from tests.models.rounded import in_fp8
from tests.models.test_attention import mixed_rows, store_for
from tests.models.test_reuse_graphs import PLACES, reuse_rows
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import EngineConfig
from vdiff_kserve.models import (
    Decoder,
    ForwardBatch,
    KeyValueStore,
    ReuseGraphs,
    RowSpan,
    fp8,
    fused,
    load_decoder,
)
from vdiff_kserve.models.layers import RMSNorm

CUDA = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY,
        reason="there is no GPU here that multiplies fp8",
    ),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def calm(**changes: object) -> Decoder:
    """A tiny decoder in bfloat16 whose attention is not so sharp that it makes much of rounding."""
    made = tiny_decoder(head_dim=64, hidden_size=256, **changes)
    for parameter in made.layers.parameters():
        parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    return made.to(CUDA, torch.bfloat16)


def joined_in_fp8(**changes: object) -> Decoder:
    """The same in fp8, as it is loaded."""
    made = in_fp8(calm(**changes))
    made.join_layers()
    assert all(layer.attention.is_joined and layer.attention.in_fp8 for layer in made.layers)
    return made


def assert_near(got: Tensor, want: Tensor, share: float) -> None:
    """As a whole: a last bit can turn which of two numbers of fp8 is taken, a sixteenth apart."""
    difference = (got.float() - want.float()).norm() / want.float().norm()
    assert difference < share, f"{difference:.3f}"


def on_gpu(store: KeyValueStore) -> KeyValueStore:
    return KeyValueStore(*(t.to(CUDA, torch.bfloat16) for t in (store.keys, store.values)))


def test_the_product_and_the_kernels_work() -> None:
    assert fp8.agrees(CUDA, 4096, 12_288)
    assert fp8.multiplies(CUDA, 64, 48)
    assert fused.rounding_agrees(CUDA)
    assert fused.rounds(torch.zeros(2, 18_944, device=CUDA, dtype=torch.bfloat16))


@pytest.mark.parametrize("size", [48, 4096, 12_288, 18_944])
def test_kernels_round_as_plain_operations_do(size: int) -> None:
    """But for numbers in the middle of two, which a last bit of the quotient can turn."""
    x, other = torch.randn(2, 37, size, device=CUDA).bfloat16()
    x[3] = 0
    x[4] *= 1000
    norm = RMSNorm(size, 1e-5).to(CUDA, torch.bfloat16)
    norm.weight.copy_(torch.randn(size))
    pairs = [(fp8.round_rows(x), fp8._round_plainly(x))]
    gate, up = torch.cat((x, other), dim=-1).chunk(2, dim=-1)
    activated = fused.silu_product(gate, up)
    pairs.append((fp8.round_product(gate, up), fp8._round_plainly(activated)))
    if size <= fused.LARGEST:
        total, normed = norm.of_sum(x, other)
        same, rounded = norm.rounded(x, other)
        assert torch.equal(same, total)
        pairs.append((rounded, fp8._round_plainly(normed)))
    for got, want in pairs:
        torch.testing.assert_close(got.scales, want.scales, rtol=1e-6, atol=0)
        differ = got.values.view(torch.uint8) != want.values.view(torch.uint8)
        assert differ.float().mean() < 1e-3
        torch.testing.assert_close(
            got.values.float(), want.values.float(), rtol=0.13, atol=0.002, check_dtype=False
        )


@pytest.mark.parametrize("tokens", [1, 7, 32, 33, 1000, 1024])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 12_288), (12_288, 4096), (48, 144)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_rounded_numbers(
    tokens: int, inputs: int, outputs: int, has_bias: bool
) -> None:
    """In float32, of the same rounded numbers."""
    x = torch.randn(tokens, inputs, device=CUDA).bfloat16()
    layer = fp8.Fp8Linear(inputs, outputs)
    layer.fill(torch.randn(outputs, inputs, device=CUDA).bfloat16() * 0.02)
    if has_bias:
        layer.bias = torch.nn.Parameter(torch.randn(outputs, device=CUDA).bfloat16())
    rounded = fp8.round_rows(x)
    weight = layer.weight.float() * layer.scales[:, None]
    bias = None if layer.bias is None else layer.bias.float()
    want = F.linear(rounded.values.float() * rounded.scales, weight, bias)
    got = layer(x).float()
    # Hopper's tensor cores add up with 14 bits: of 12,288 products, a few in 100,000 sums are off.
    close = torch.isclose(got, want, atol=0.01 * float(want.std()), rtol=0.01)
    assert (~close).float().mean() < 1e-3
    assert (got - want).norm() < 0.01 * want.norm()
    exact = F.linear(x.float(), weight, bias)
    assert (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_number_types_are_computed_too(dtype: torch.dtype) -> None:
    layer = fp8.Fp8Linear(256, 512, torch.nn.Parameter(torch.randn(512, device=CUDA, dtype=dtype)))
    layer.fill(torch.randn(512, 256, device=CUDA, dtype=dtype) * 0.1)
    x = torch.randn(40, 256, device=CUDA, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    want = fp8._multiply_plainly(fp8.round_rows(x), layer.weight, layer.scales, layer.bias)
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def test_a_token_is_computed_as_beside_others() -> None:
    """Scales are its own. What is left is how products of other sizes add up."""
    layer = fp8.Fp8Linear(4096, 4096)
    layer.fill(torch.randn(4096, 4096, device=CUDA).bfloat16() * 0.02)
    x = torch.randn(1024, 4096, device=CUDA).bfloat16()
    x[512:] *= 1000
    whole, rounded = layer(x), fp8.round_rows(x)
    for tokens in (slice(0, 1), slice(5, 37), slice(0, 512)):
        alone = fp8.round_rows(x[tokens])
        assert torch.equal(alone.scales, rounded.scales[tokens])
        assert torch.equal(alone.values.view(torch.uint8), rounded.values[tokens].view(torch.uint8))
        torch.testing.assert_close(layer(x[tokens]), whole[tokens], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True, "rotary_dim": 32}])
def test_a_decoder_in_fp8_computes_what_plain_operations_compute(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every kernel, and with the same numbers widened; and near the model in bfloat16."""
    made, whole = joined_in_fp8(**changes), calm(**changes)
    cases = [(reuse_rows(5, random.Random(0)), PLACES)]
    cases += [(rows, places) for *rows, places in (mixed_rows(random.Random(s)) for s in (4, 8))]

    def states_of(decoder: Decoder) -> list[Tensor]:
        stores = [on_gpu(store_for(decoder, places)) for _, places in cases]
        return [
            decoder(ForwardBatch.pack(canvases, spans, store, CUDA))
            for ((canvases, spans), _), store in zip(cases, stores, strict=True)
        ]

    native, plain = states_of(made), states_of(whole)
    monkeypatch.setattr(fp8, "multiplies", lambda *_: False)
    monkeypatch.setattr(fused, "rounds", lambda _: False)
    for got, widened, exact in zip(native, states_of(made), plain, strict=True):
        assert_near(got, widened, 0.1)
        assert_near(got, exact, 0.15)
        assert not torch.equal(got, exact)


def test_a_captured_pass_in_fp8_computes_what_the_pass_computes() -> None:
    made = joined_in_fp8()
    graphs = ReuseGraphs.for_model(made, 96)
    assert graphs is not None
    rng, shared = random.Random(0), on_gpu(store_for(made, PLACES))
    for rows in (7, 5, 8, 1):
        canvases, spans = reuse_rows(rows, rng)
        expected = made(ForwardBatch.pack(canvases, spans, shared, CUDA))
        replayed = graphs.run(canvases, spans, shared)
        assert replayed is not None, "the pass was not captured"
        assert_near(replayed, expected, 0.1)
    canvas, span = torch.arange(90) % 30, RowSpan(0, 90, 90, 0, 8, 10)
    expected = made(ForwardBatch.pack([canvas], [span], shared, CUDA))
    for is_captured in (False, True):
        replayed = graphs.run_whole(canvas, span, shared)
        assert (replayed is not None) == is_captured
    assert replayed is not None
    assert_near(replayed, expected, 0.1)


def test_a_checkpoint_is_loaded_in_fp8(tmp_path: Path) -> None:
    """Joined, in a byte for each weight."""
    config = CONFIG | {"d_model": 256, "mlp_hidden_size": 512, "n_heads": 4, "n_kv_heads": 2}
    folder = write_single(tmp_path, config, tensors_of(config))
    decoder, _ = load_decoder(folder, CUDA, torch.bfloat16, quantization="fp8")
    for layer in decoder.layers:
        assert layer.attention.is_joined
        assert layer.mlp.is_joined
        assert layer.mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    plain, _ = load_decoder(folder, CUDA, torch.bfloat16)
    ids, span = torch.tensor([5, 17, 30, 41] * 5), RowSpan(0, 20, 20, 0, 20)
    got, want = (
        each.logits(each(ForwardBatch.pack([ids], [span], None, CUDA))).float()
        for each in (decoder, plain)
    )
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_the_embedded_model_answers_in_fp8() -> None:
    decoder, spec = load_decoder(EMBEDDED, CUDA, torch.bfloat16, quantization="fp8")
    requests = [request_of((5, 6, 7 + i), 16, cache="dual") for i in range(4)]
    with running(decoder, EngineConfig(kv_cache_tokens=400), spec=spec) as engine:
        results = engine.generate(requests)
    assert all(len(result.token_ids) == 16 for result in results)
