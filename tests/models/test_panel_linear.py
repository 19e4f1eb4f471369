"""Linear layers of the CPU library: what they compute, and when they are left to oneDNN."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.device import needs_cpu_library
from vdiff_kserve.models import cpu_kernels, cpu_pass, panel_linear
from vdiff_kserve.models.packed_linear import PackedLinear, packed
from vdiff_kserve.models.panel_linear import PanelLinear, can_lay_out, gated

pytestmark = needs_cpu_library


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layer(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """In float64."""
    bias = 0 if linear.bias is None else linear.bias.double()
    return x.double() @ linear.weight.double().T + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5, 6, 97, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (48, 80), (130, 64), (2200, 129)])
def test_it_computes_what_linear_computes(
    inputs: int, outputs: int, tokens: int, bias: bool
) -> None:
    """Sizes on both sides of the groups, panels and chunks of the kernel."""
    linear, x = layer(inputs, outputs, bias=bias), torch.randn(tokens, inputs).bfloat16()
    got = PanelLinear(linear)(x)
    torch.testing.assert_close(got, exact(linear, x).bfloat16(), atol=1e-3, rtol=0.01)


def test_other_shapes_and_layouts_of_the_input() -> None:
    linear, x = layer(48, 80), torch.randn(2, 48, 7).bfloat16().transpose(1, 2)
    got = PanelLinear(linear)(x)
    torch.testing.assert_close(got, exact(linear, x).bfloat16(), atol=1e-3, rtol=0.01)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 48), torch.zeros((3, 46), dtype=torch.bfloat16), torch.zeros(48).half()]
)
def test_what_it_cannot_read_is_refused(x: Tensor) -> None:
    one = PanelLinear(layer(48, 80))
    for multiply in (one, partial(gated, one, one)):
        with pytest.raises(ValueError, match="48 inputs in bfloat16 on a CPU got"):
            multiply(x)


@pytest.mark.parametrize("tokens", [1, 100])
def test_gate_and_product_are_rounded_once(tokens: int) -> None:
    gate, up = layer(48, 80, bias=True), layer(48, 80)
    x = 3 * torch.randn(tokens, 48).bfloat16()
    want = F.silu(exact(gate, x)) * exact(up, x)
    got = gated(PanelLinear(gate), PanelLinear(up), x)
    torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=0.006)


def test_gates_far_from_zero_stay_finite() -> None:
    one = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    one.weight.copy_(torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[-3e38, 0], [-300, 0], [300, 0], [3e38, 0]]).bfloat16()
    up = nn.Linear(2, 1, dtype=torch.bfloat16)
    up.weight.zero_()
    up.bias.fill_(1)
    got = gated(PanelLinear(one), PanelLinear(up), x)[:, 0]
    assert got.equal(torch.tensor([0, 0, 300, 3e38]).bfloat16())


def test_a_token_is_the_same_whatever_else_is_in_the_batch() -> None:
    panel, x = PanelLinear(layer(2200, 129)), torch.randn(100, 2200).bfloat16()
    together = panel(x)
    for size in (1, 3, 32, 64):
        assert panel(x[-size:]).equal(together[-size:])


def test_layers_that_it_does_not_take_are_packed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(packed(layer(48, 80)), PanelLinear)
    assert isinstance(packed(layer(47, 80)), PackedLinear), "inputs are taken in pairs"
    assert isinstance(packed(layer(48, 80).float()), PackedLinear)
    monkeypatch.setattr(cpu_kernels, "has_tiles", lambda: True)
    assert not can_lay_out(layer(48, 80))


def test_the_check_leaves_torchs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert panel_linear.agrees()
    assert cpu_pass.agrees()
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["linear", "gated"])
def test_wrong_products_are_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert panel_linear.agrees()
    right = panel_linear.library()

    class Wrong:
        linear, gated = right.linear, right.gated

    def wrong(x: int, *rest: object) -> None:
        *layers_and_out, tokens, threads = rest
        getattr(right, name)(x + 4, *layers_and_out, tokens - 1, threads)

    monkeypatch.setattr(Wrong, name, staticmethod(wrong))
    monkeypatch.setattr(panel_linear, "library", lambda: Wrong)
    assert not panel_linear.agrees()
