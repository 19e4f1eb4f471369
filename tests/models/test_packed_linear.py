import pytest
import torch
from packaging.version import Version
from torch import nn

from vdiff_kserve.models.packed_linear import (
    PackedLinear,
    can_pack,
    gated_linear,
    pack_linear_layers,
)

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, 32, 200])
@torch.inference_mode()
def test_packed_layer_computes_what_linear_computes(
    dtype: torch.dtype, bias: bool, tokens: int
) -> None:
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(tokens, 48, dtype=dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), **tolerance)


@torch.inference_mode()
def test_a_row_is_the_same_whatever_else_is_in_the_batch() -> None:
    """To the bit, with the torch that we install: 2.11's oneDNN adds up many rows otherwise."""
    is_exact = Version(torch.__version__) >= Version("2.13")
    packed = PackedLinear(nn.Linear(512, 300, bias=False))
    x = torch.randn(100, 512)
    together = packed(x)
    for size in (1, 3, 32, 64):
        alone = packed(x[:size].contiguous())
        torch.testing.assert_close(alone, together[:size], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone, together[:size]) or not is_exact


def test_every_linear_layer_is_replaced_and_no_weight_is_kept_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 2, bias=False)]), nn.ReLU())
    pack_linear_layers(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert list(model.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_activation_and_product_are_those_of_the_plain_layers(dtype: torch.dtype) -> None:
    gate, up = (nn.Linear(48, 80, bias=False, dtype=dtype) for _ in range(2))
    x = torch.randn(33, 48, dtype=dtype)
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)
    torch.testing.assert_close(
        gated_linear(PackedLinear(gate), PackedLinear(up), x),
        gated_linear(gate, up, x),
        **tolerance,
    )
