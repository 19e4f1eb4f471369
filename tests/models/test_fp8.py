"""Linear layers in fp8 as they are computed anywhere; `test_gpu_fp8.py` is about GPUs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.device import pack
from tests.engine.tiny import tiny_decoder
from tests.models.folders import CONFIG, tensors_of, write_single
from tests.models.plain_kernels import use_plain_kernels
from tests.models.rounded import in_fp8
from vdiff_kserve.models import Decoder, RowSpan, fp8, fused, load_decoder, loader
from vdiff_kserve.models.fp8 import Fp8Linear, Rounded
from vdiff_kserve.models.layers import RMSNorm
from vdiff_kserve.models.moe import MoEConfig

CPU = torch.device("cpu")
NATIVE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def widened(x: Rounded) -> Tensor:
    return x.values.double() * x.scales.double()


def layer_of(weight: Tensor, bias: Tensor | None = None) -> Fp8Linear:
    layer = Fp8Linear(
        weight.shape[1], weight.shape[0], None if bias is None else nn.Parameter(bias)
    )
    layer.fill(weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_a_sixteenth(dtype: torch.dtype) -> None:
    """Or, near nothing, to a part of the row's largest."""
    x = (random_numbers(20, 64) * torch.logspace(-3, 3, 20)[:, None]).to(dtype)
    rounded = fp8.round_rows(x)
    assert rounded.values.dtype == torch.float8_e4m3fn
    assert torch.equal(rounded.values.float().abs().amax(dim=1), torch.full((20,), 448.0))
    error, largest = (widened(rounded) - x).abs(), x.double().abs().amax(dim=1, keepdim=True)
    assert (error <= x.double().abs() / 16 + largest / 448 / 1024).all()


def test_all_numbers_are_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[~every.float().isnan()]
    assert len(finite) == 254
    assert torch.equal(fp8.widen(finite), finite.to(torch.bfloat16))


def test_zeros_stay_and_what_is_no_number_stays_none() -> None:
    x = torch.zeros(3, 16)
    x[1, 4] = torch.nan
    layer = layer_of(random_numbers(32, 16))
    product = layer(x)
    assert not product[[0, 2]].any()
    assert product[1].isnan().all()


def test_a_row_is_rounded_by_itself() -> None:
    x = random_numbers(9, 32)
    together = fp8.round_rows(x * torch.logspace(0, 8, 9)[:, None])
    alone = fp8.round_rows(x[:1])
    assert torch.equal(widened(together)[:1], widened(alone))
    chosen = together[torch.tensor([8, 0])]
    assert torch.equal(widened(chosen), widened(together)[[8, 0]])


def test_a_norm_and_a_product_are_rounded_as_they_are() -> None:
    x, other = random_numbers(2, 5, 48).bfloat16()
    norm = RMSNorm(48, 1e-5)
    norm.weight = nn.Parameter(random_numbers(48, seed=1).bfloat16(), requires_grad=False)
    total, rounded = norm.rounded(x, other)
    assert torch.equal(total, x + other)
    assert torch.equal(widened(rounded), widened(fp8.round_rows(norm.of_sum(x, other)[1])))
    same, rounded = norm.rounded(x, None)
    assert same is x
    assert torch.equal(widened(rounded), widened(fp8.round_rows(norm(x))))
    product = fp8.round_product(x, other)
    assert torch.equal(widened(product), widened(fp8.round_rows(F.silu(x) * other)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_multiplies_the_rounded_numbers(
    dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight is rounded a few rows at a time, each by its own scale."""
    monkeypatch.setattr(fp8, "ROWS", 7)
    x, weight = random_numbers(5, 64).to(dtype), random_numbers(48, 64, seed=1).to(dtype)
    weight *= torch.logspace(-2, 2, 48)[:, None]
    bias = random_numbers(48, seed=2).to(dtype) if has_bias else None
    layer = layer_of(weight, bias)
    whole = fp8.round_rows(weight)
    assert torch.equal(layer.weight.float(), whole.values.float())
    want = widened(fp8.round_rows(x)) @ widened(whole).t()
    want += 0 if bias is None else bias.double()
    got = layer(x)
    assert got.dtype == dtype
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=4 * precision, atol=64 * precision)


@pytest.mark.skipif(not NATIVE, reason="this torch multiplies rows' scales on GPUs only")
def test_torch_multiplies_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator is called rightly, and a wrong product would be noticed before it is used."""
    assert fp8.agrees(CPU, 48, 64)
    x, weight = random_numbers(3, 32), random_numbers(16, 32, seed=1)
    bias = random_numbers(16, seed=2)
    rounded, layer = fp8.round_rows(x), layer_of(weight, bias)
    got = fp8._multiply_natively(rounded, layer.weight, layer.scales, layer.bias)
    torch.testing.assert_close(got, layer(x), rtol=0.01, atol=0.05)
    monkeypatch.setattr(
        fp8, "_multiply_natively", lambda x, weight, *_: x.values.float() @ weight.t().float()
    )
    assert not fp8.agrees(CPU, 48, 64)


@pytest.mark.parametrize("raises", [False, True])
def test_sizes_that_are_not_multiplied_are_widened_and_told(
    raises: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As cuBLAS refuses some."""

    def agrees(*_: object) -> bool:
        if raises:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return False

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fp8, "agrees", agrees)
    with caplog.at_level(logging.WARNING):
        assert not fp8.multiplies.__wrapped__(CPU, 48, 64)
    assert "Layers of 64 inputs and 48 outputs are computed in a wider type than fp8" in caplog.text
    assert ("CUBLAS_STATUS_NOT_SUPPORTED" if raises else "is wrong") in caplog.text


def test_old_gpus_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert not fp8.multiplies.__wrapped__(torch.device("cuda"), 48, 64)
    assert not fused.rounding_works.__wrapped__(torch.device("cuda"))


EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, expert_size=16, shared_size=32)


@torch.inference_mode()
def states_of(decoder: Decoder) -> Tensor:
    """Of two rows, of which the second wants a few tokens only."""
    spans = [RowSpan(0, 24, 24, 0, 24), RowSpan(0, 24, 24, 8, 8)]
    return decoder(pack([torch.arange(24), torch.arange(24).flip(0)], spans))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True, "rotary_dim": 4}])
@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_joined_layers_in_fp8_are_those_apart(
    changes: dict, moe: MoEConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU computes them, but for its kernels."""
    decoder = in_fp8(tiny_decoder(num_layers=3, moe=moe, head_dim=16, **changes))
    apart = states_of(decoder)
    decoder.join_layers()
    assert all(layer.attention.is_joined for layer in decoder.layers)
    use_plain_kernels(monkeypatch)
    difference = (states_of(decoder) - apart).float().norm() / apart.float().norm()
    assert difference < 0.01


def test_a_checkpoint_is_read_into_joined_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG | {"d_model": 64, "n_kv_heads": 4}
    folder = write_single(tmp_path, config, tensors_of(config))
    apart, _ = load_decoder(folder, quantization="fp8")
    monkeypatch.setattr(loader, "gains_from_joining", lambda _: True)
    joined, _ = load_decoder(folder, quantization="fp8")
    for layer in joined.layers:
        assert layer.attention.is_joined
        assert layer.mlp.is_joined
        gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
        assert gate.weight.untyped_storage().data_ptr() == up.weight.untyped_storage().data_ptr()
    for name, parameter in joined.named_parameters():
        assert torch.equal(parameter.float(), apart.get_parameter(name).float()), name


def test_layers_of_other_sizes_stay_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG | {"mlp_hidden_size": 40, "n_kv_heads": 4}
    folder = write_single(tmp_path, config, tensors_of(config))
    with caplog.at_level(logging.WARNING):
        decoder, _ = load_decoder(folder, quantization="fp8")
    assert "6 linear layers are not in fp8, such as layers.0.mlp.gate_proj" in caplog.text
    assert decoder.layers[0].attention.in_fp8
    assert not decoder.layers[0].mlp.in_fp8
    exact, _ = load_decoder(folder)
    difference = (states_of(decoder) - states_of(exact)).norm() / states_of(exact).norm()
    assert 0 < difference < 0.1


def test_layers_of_which_some_are_in_fp8_are_not_joined() -> None:
    decoder = tiny_decoder(head_dim=8, num_kv_heads=1)  # keys and values of 8 outputs
    in_fp8(decoder).join_layers()
    attention = decoder.layers[0].attention
    assert isinstance(attention.q_proj, Fp8Linear)
    assert isinstance(attention.k_proj, nn.Linear)
    assert not attention.is_joined
    assert not attention.in_fp8
    assert decoder.layers[0].mlp.is_joined
    assert states_of(decoder).isfinite().all()
