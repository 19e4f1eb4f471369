"""Weights in fewer bits: nearly the same answers, less memory, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.golden import GOLDEN_DIR
from tests.models.folders import CONFIG, tensors_of, write_single
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.models import CheckpointError, Decoder, ForwardBatch, load_decoder, quantization

KINDS = quantization.QUANTIZATIONS
SIZES = {"d_model": 64, "mlp_hidden_size": 128, "n_kv_heads": 4}


@torch.inference_mode()
def logits_of(decoder: Decoder) -> Tensor:
    ids = torch.tensor([[5, 17, 300, 41, 7, 7, 7, 7]]) % decoder.config.vocab_size
    return decoder.logits(decoder(ForwardBatch.dense(ids))).float()


def folder_of(tmp_path: Path, **changes: object) -> Path:
    config = CONFIG | SIZES | changes
    return write_single(tmp_path, config, tensors_of(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("fp8", 0.1), ("int4", 0.4)])
def test_logits_stay_close(kind: str, tolerance: float, dtype: torch.dtype) -> None:
    exact = logits_of(load_decoder(EMBEDDED, dtype=dtype)[0])
    rounded = logits_of(load_decoder(EMBEDDED, dtype=dtype, quantization=kind)[0])
    difference = (rounded - exact).norm() / exact.norm()
    assert 0 < difference < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_quantized_and_nothing_else(tmp_path: Path, kind: str) -> None:
    plain, _ = load_decoder(folder_of(tmp_path))
    decoder, _ = load_decoder(tmp_path, quantization=kind)
    linear = [m for m in decoder.layers.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 14
    assert not any(type(layer.weight.data) is Tensor for layer in linear)
    assert torch.equal(decoder.embed_tokens.weight, plain.embed_tokens.weight)
    assert torch.equal(decoder.norm.weight, plain.norm.weight)
    hidden = torch.randn(3, 64)
    assert torch.equal(decoder.logits(hidden), plain.logits(hidden))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_weight_takes_a_byte(tmp_path: Path, kind: str) -> None:
    decoder, _ = load_decoder(folder_of(tmp_path), quantization=kind)
    weight = decoder.layers[0].mlp.gate_proj.weight
    stored = [getattr(weight, name) for name in weight.tensor_data_names]
    assert sum(part.nbytes for part in stored) < 1.1 * weight.numel()


def test_biases_and_tied_heads_are_kept() -> None:
    exact, _ = load_decoder(GOLDEN_DIR / "dream")
    rounded, _ = load_decoder(GOLDEN_DIR / "dream", quantization="int8")
    bias = rounded.layers[0].attention.q_proj.bias
    assert bias.abs().max() > 0
    assert (logits_of(rounded) - logits_of(exact)).norm() < 0.05 * logits_of(exact).norm()


def test_a_tied_head_stays_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, weight_tying=True)
    exact, rounded = (load_decoder(folder, quantization=kind)[0] for kind in (None, "int8"))
    hidden = torch.randn(3, 64)
    assert torch.equal(rounded.logits(hidden), exact.logits(hidden))


def refusal(folder: Path, kind: str, **options: torch.dtype) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_decoder(folder, quantization=kind, **options)
    return str(caught.value)


def test_experts_are_refused() -> None:
    message = refusal(GOLDEN_DIR / "llada_moe", "int8")
    assert message.startswith("--quantization int8 is for dense models")


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, mlp_hidden_size=48)
    assert "rows of a multiple of 32 weights, the model has 48" in refusal(folder, "int4")
    load_decoder(folder, quantization="int8")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    assert "pip install 'vdiff-kserve[quantization]'" in refusal(folder_of(tmp_path), "fp8")


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
