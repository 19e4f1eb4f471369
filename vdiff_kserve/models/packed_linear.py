"""Linear layers for CPUs: weights kept in the layout that oneDNN multiplies fastest.

`nn.Linear` packs its weight anew on every call, which is most of the cost when few tokens pass
through (a cached step runs one block), and in float32 it uses a library that leaves AVX-512 unused
on some processors. These operators are what `torch.compile` puts in place of frozen linear layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def silu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`silu(layer(x))` of a linear layer, packed or not."""
    return layer.silu(x) if isinstance(layer, PackedLinear) else F.silu(layer(x))


def multiplied_linear(layer: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
    """`layer(x) * factor` of a linear layer, packed or not."""
    return layer.multiplied(x, factor) if isinstance(layer, PackedLinear) else layer(x) * factor


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
    setattr(module.get_submodule(parent), name, PackedLinear(layer))


def pack_linear_layers(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside `module` in turn; its plain weight is freed."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)
