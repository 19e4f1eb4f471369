"""Linear layers for CPUs: weights kept in the layout that is multiplied fastest.

`nn.Linear` packs its weight anew on every call, which is most of the cost when few tokens pass
through (a cached step runs one block), and in float32 it uses a library that leaves AVX-512 unused
on some processors. oneDNN's operators, which `torch.compile` puts in place of frozen linear layers,
take a weight as they read it; so do those of `panel_linear`, which are for bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve.models.panel_linear import PanelLinear, can_lay_out, gated

EXPECTED_TOKENS = 32
"""The number of rows that the layout is chosen for: a block. Other numbers work as well."""


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] in the packed layout, for `linear_packed`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_TOKENS)


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU, float32 or bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = pack_weight(linear.weight)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return linear_packed(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """`silu(self(x))` in one pass over the result."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "swish", [], "")

    def multiplied(self, x: Tensor, factor: Tensor) -> Tensor:
        """`self(x) * factor` in one pass over the result."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x, factor, self._weight, self._bias, "mul")


def gated_linear(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """`silu(gate(x)) * up(x)` of linear layers, packed or not."""
    if isinstance(gate, PanelLinear) and isinstance(up, PanelLinear):
        return gated(gate, up, x)
    gates = gate.silu(x) if isinstance(gate, PackedLinear) else F.silu(gate(x))
    return up.multiplied(x, gates) if isinstance(up, PackedLinear) else up(x) * gates


def packed(linear: nn.Linear) -> nn.Module:
    """A linear layer's weight in the layout that is multiplied fastest."""
    return PanelLinear(linear) if can_lay_out(linear) else PackedLinear(linear)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed layers run here."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_linear_layer(module: nn.Module, parameter: str, weight: Tensor) -> None:
    """Replace the `nn.Linear` inside `module` whose weight is called `parameter`.

    Args:
        weight: its value, copied; a bias is taken from the layer.
    """
    path = parameter.rpartition(".")[0]
    layer = module.get_submodule(path)
    assert isinstance(layer, nn.Linear), f"{path} is no linear layer"
    layer.weight = nn.Parameter(weight, requires_grad=False)
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, packed(layer))


def pack_linear_layers(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside `module` in turn; its plain weight is freed."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, packed(child))
        else:
            pack_linear_layers(child)
