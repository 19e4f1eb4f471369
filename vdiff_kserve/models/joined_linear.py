"""Linear layers that multiply the same input, as one product.

A GPU takes longer for three products of a few tokens than for one with all of their outputs: each
begins and ends with most of the GPU idle. The layers stay what they are, with their names; only
their weights lie one behind the other in memory, so that they are also the parts of one weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve.models import fp8, fused
from vdiff_kserve.models.fp8 import Activations, Fp8Linear


class JoinedLinear(nn.Module):
    """A module some of whose linear layers may be joined.

    Attributes:
        joinable: the layers' names, in the order of their outputs in the product.
    """

    joinable: ClassVar[tuple[str, ...]]
    _whole: Callable[..., Tensor] | None = None

    def join(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Lay the layers' weights, and their biases, one behind the other on `device`. Those that
        have values keep them; others get memory. Layers of which some are in fp8 stay apart."""
        layers = self._layers
        if not self.in_fp8 and any(isinstance(layer, Fp8Linear) for layer in layers):
            return
        parts = {"weight": fused.FP8, "scales": torch.float32} if self.in_fp8 else {"weight": dtype}
        whole = {name: _lay_out(layers, name, device, of) for name, of in parts.items()}
        has_bias = layers[0].bias is not None
        bias = _lay_out(layers, "bias", device, dtype) if has_bias else None
        self._whole = partial(fp8.multiply if self.in_fp8 else F.linear, **whole, bias=bias)

    @property
    def is_joined(self) -> bool:
        """Whether `multiply_joined` can be called."""
        return self._whole is not None

    @property
    def in_fp8(self) -> bool:
        """Whether the layers are, so that their input can be rounded once for all of them."""
        return all(isinstance(self._modules[name], Fp8Linear) for name in self.joinable)

    @property
    def _layers(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.joinable]

    def multiply_joined(self, x: Activations) -> Tensor:
        """What all the layers make of `x`, side by side: [tokens, sum of outputs]."""
        assert self._whole is not None, "the layers are not joined"
        return self._whole(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._whole = None  # the weights that `fn` makes lie apart
        return super()._apply(fn, recurse)


def gains_from_joining(device: torch.device) -> bool:
    """Whether layers are faster joined. A CPU has operators that take two of them better apart."""
    return device.type == "cuda"


def _lay_out(
    layers: list[nn.Module], name: str, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """One piece of memory, whose parts are then the layers' parameters called `name`."""
    parameters = [getattr(layer, name).detach() for layer in layers]
    rows = [len(parameter) for parameter in parameters]
    whole = torch.empty((sum(rows), *parameters[0].shape[1:]), device=device, dtype=dtype)
    for layer, parameter, part in zip(layers, parameters, whole.split(rows), strict=True):
        if not parameter.is_meta:
            part.copy_(parameter)
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    return whole
