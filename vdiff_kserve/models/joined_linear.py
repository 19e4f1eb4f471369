"""Linear layers that multiply the same input, as one product.

A GPU takes longer for three products of a few tokens than for one with all of their outputs: each
begins and ends with most of the GPU idle. The layers stay what they are, with their names; only
their weights lie one behind the other in memory, so that they are also the parts of one weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JoinedLinear(nn.Module):
    """A module some of whose linear layers may be joined.

    Attributes:
        joinable: the layers' names, in the order of their outputs in the product.
    """

    joinable: ClassVar[tuple[str, ...]]
    _whole: tuple[Tensor, Tensor | None] | None = None

    def join(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Lay the layers' weights, and their biases, one behind the other on `device`. Those that
        have values keep them; others get memory."""
        layers = [self.get_submodule(name) for name in self.joinable]
        weight = _lay_out(layers, "weight", device, dtype)
        has_bias = layers[0].bias is not None
        self._whole = weight, _lay_out(layers, "bias", device, dtype) if has_bias else None

    @property
    def is_joined(self) -> bool:
        """Whether `multiply_joined` can be called."""
        return self._whole is not None

    def multiply_joined(self, x: Tensor) -> Tensor:
        """What all the layers make of `x`, side by side: [tokens, sum of outputs]."""
        assert self._whole is not None, "the layers are not joined"
        return F.linear(x, *self._whole)

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
