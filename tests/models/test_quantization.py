"""Weights in fewer bits: nearly the same answers, less memory, and clear refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.device import TEST_DEVICE, pack
from tests.golden import GOLDEN_DIR
from tests.models.folders import CONFIG, random_tensors, tensors_of, write_single
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.models import (
    CheckpointError,
    Decoder,
    load_decoder,
    moe,
    quantization,
)
from vdiff_kserve.models.fp8 import Fp8Linear
from vdiff_kserve.models.moe import Experts, MoEConfig, SparseMLP

pytestmark = pytest.mark.skipif(
    TEST_DEVICE.type != "cpu" and find_spec("torchao") is None, reason="torchao is not installed"
)
KINDS = quantization.QUANTIZATIONS
SIZES = {"d_model": 64, "mlp_hidden_size": 128, "n_kv_heads": 4}


def load(
    folder: Path | str, kind: str | None = None, dtype: torch.dtype = torch.float32
) -> Decoder:
    """The decoder on `TEST_DEVICE`."""
    if kind == "int4" and TEST_DEVICE.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("four bits on a GPU are for bfloat16")
    return load_decoder(folder, TEST_DEVICE, dtype, quantization=kind)[0]


@torch.inference_mode()
def logits_of(decoder: Decoder) -> Tensor:
    ids = torch.tensor([5, 17, 300, 41, 7, 7, 7, 7]) % decoder.config.vocab_size
    return decoder.logits(decoder(pack([ids]))).float()


def folder_of(tmp_path: Path, **changes: object) -> Path:
    config = CONFIG | SIZES | changes
    return write_single(tmp_path, config, tensors_of(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("fp8", 0.1), ("int4", 0.4)])
def test_logits_stay_close(kind: str, tolerance: float, dtype: torch.dtype) -> None:
    exact = logits_of(load(EMBEDDED, dtype=dtype))
    rounded = logits_of(load(EMBEDDED, kind, dtype))
    difference = (rounded - exact).norm() / exact.norm()
    assert 0 < difference < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_quantized_and_nothing_else(tmp_path: Path, kind: str) -> None:
    plain = load(folder_of(tmp_path))
    decoder = load(tmp_path, kind)
    linear = [m for m in decoder.layers.modules() if isinstance(m, nn.Linear | Fp8Linear)]
    assert len(linear) == 14
    for layer in linear:
        assert isinstance(layer, Fp8Linear) == (kind == "fp8")
        assert bytes_of(layer.weight) < 1.1 * layer.weight.numel()
    assert torch.equal(decoder.embed_tokens.weight, plain.embed_tokens.weight)
    assert torch.equal(decoder.norm.weight, plain.norm.weight)
    hidden = torch.randn(3, 64, device=TEST_DEVICE)
    assert torch.equal(decoder.logits(hidden), plain.logits(hidden))


def test_biases_and_tied_heads_are_kept() -> None:
    exact = load(GOLDEN_DIR / "dream")
    rounded = load(GOLDEN_DIR / "dream", "int8")
    bias = rounded.layers[0].attention.q_proj.bias
    assert bias.abs().max() > 0
    assert (logits_of(rounded) - logits_of(exact)).norm() < 0.05 * logits_of(exact).norm()


def test_a_tied_head_stays_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, weight_tying=True)
    exact, rounded = (load(folder, kind) for kind in (None, "int8"))
    hidden = torch.randn(3, 64, device=TEST_DEVICE)
    assert torch.equal(rounded.logits(hidden), exact.logits(hidden))


def refusal(folder: Path, kind: str, **options: torch.dtype) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_decoder(folder, quantization=kind, **options)
    return str(caught.value)


def with_experts(tmp_path: Path, family: str) -> Path:
    """A random checkpoint of `family`, most of whose weights are experts'."""
    config = json.loads((GOLDEN_DIR / family / "config.json").read_text(encoding="utf-8"))
    size = "expert_intermediate_size" if family == "llada_moe" else "moe_intermediate_size"
    config |= {size: 96, "num_experts": 16}
    return write_single(tmp_path, config, random_tensors(config))


def bytes_of(weight: Tensor) -> int:
    """Memory of a weight, quantized or not."""
    parts = getattr(weight, "tensor_data_names", None)
    return weight.nbytes if parts is None else sum(getattr(weight, name).nbytes for name in parts)


@pytest.mark.parametrize("family", ["llada_moe", "llada2"])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.03), ("fp8", 0.1), ("int4", 0.4)])
def test_experts_are_quantized_too(
    tmp_path: Path, family: str, kind: str, tolerance: float
) -> None:
    """Nearly the same logits, in about a byte for each of the experts' weights."""
    folder = with_experts(tmp_path, family)
    exact = load(folder)
    rounded = load(folder, kind)
    difference = (logits_of(rounded) - logits_of(exact)).norm() / logits_of(exact).norm()
    assert 0 < difference < tolerance
    layers = [layer.mlp for layer in rounded.layers if isinstance(layer.mlp, SparseMLP)]
    assert len(layers) >= 2
    for layer in layers:
        assert not dict(layer.experts.named_parameters()), "the plain weights are freed"
        weights = [weight for pair in layer.experts._packed for weight in pair]
        elements = sum(weight.numel() for weight in weights)
        assert elements == 16 * 3 * 96 * 64
        assert sum(bytes_of(weight) for weight in weights) < 1.2 * elements
        assert layer.router.weight.dtype is torch.float32


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("widened", [1, 3 * 96 * 64 * 2, 1 << 30])
@torch.inference_mode()
def test_experts_that_are_computed_together_are_those_computed_one_by_one(
    kind: str, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, here on the CPU: all of them at once, or a few at a time."""
    monkeypatch.setattr(moe, "WIDENED_BYTES", widened)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 64, generator=generator).bfloat16()
    chosen = torch.rand(20, 6, generator=generator).topk(3).indices + 1  # some have no tokens
    shares = torch.rand(20, 3, generator=generator)
    answers = []
    for stacked in (False, True):
        experts = Experts(64, MoEConfig(num_experts=8, experts_per_token=3, expert_size=96))
        for i, parameter in enumerate(experts.parameters()):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.data = values.bfloat16() * 0.1
        quantization.quantize_experts(experts, kind, stacked=stacked)
        if stacked:
            experts._one_by_one = experts._grouped  # type: ignore[method-assign]
        answers.append(experts(x, chosen, shares).float())
    assert (answers[1] - answers[0]).norm() < 0.01 * answers[0].norm()


def test_experts_in_four_bits_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = load_decoder(GOLDEN_DIR / "llada_moe")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "This GPU")
    unpacked = Decoder(decoder.config)
    options = torch.device("cuda"), torch.bfloat16
    with pytest.raises(CheckpointError, match=r"int4 is for dense models on a GPU: .* int8 or fp8"):
        quantization.check_quantization("int4", unpacked, *options)
    quantization.check_quantization("int8", unpacked, *options)


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mlp_hidden_size=48)
    assert "rows of a multiple of 32 weights, the model has 48" in refusal(folder, "int4")
    load_decoder(folder, quantization="int8")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    assert "pip install 'vdiff-kserve[quantization]'" in refusal(folder_of(tmp_path), "int8")
    assert logits_of(load(tmp_path, "fp8")).isfinite().all(), "which needs none"


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "reason"),
    [
        ("fp8", (8, 0), torch.bfloat16, "compute capability 8.9"),
        ("int4", (7, 5), torch.bfloat16, "compute capability 8.0"),
        ("int4", (9, 0), torch.float16, "needs --dtype bfloat16"),
    ],
)
def test_hardware_that_lacks_it_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    reason: str,
) -> None:
    decoder, _ = load_decoder(folder_of(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "This GPU")
    unpacked = Decoder(decoder.config)
    with pytest.raises(CheckpointError, match=reason):
        quantization.check_quantization(kind, unpacked, torch.device("cuda"), dtype)
    quantization.check_quantization("int8", unpacked, torch.device("cuda"), dtype)
