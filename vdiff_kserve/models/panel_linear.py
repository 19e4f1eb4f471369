"""Linear layers in bfloat16 for CPUs whose products `cpu_library` computes.

oneDNN serves layers of thousands of inputs; with a few hundred, it reaches two thirds of what the
processor multiplies. A layer's products here are added up in the same order for any number of
tokens, so that a row's numbers do not depend on the rest of its batch.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve import cpu_library
from vdiff_kserve.cpu_library import addresses, library
from vdiff_kserve.models import cpu_kernels

PANEL = 64
"""Outputs that are computed together: as `linear.h` has it."""


class LinearStruct(ctypes.Structure):
    """`Linear` of the library."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class PanelLinear(nn.Module):
    """`nn.Linear` for inference in bfloat16.

    Attributes:
        struct: the layer as the library takes it; valid as long as this module is there.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self._weight = lay_out(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach().contiguous()
        self.struct = LinearStruct(*addresses(self._weight, self._bias), inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x, struct = self.checked(x), self.struct
        out = x.new_empty((*x.shape[:-1], struct.outputs))
        tokens, threads = x.numel() // struct.inputs, torch.get_num_threads()
        library().linear(x.data_ptr(), ctypes.byref(struct), out.data_ptr(), tokens, threads)
        return out

    def checked(self, x: Tensor) -> Tensor:
        """`x`, contiguous. The library reads whatever is at its address.

        Raises:
            ValueError: it is not of this layer's type, place and size.
        """
        inputs = self.struct.inputs
        if x.dtype != torch.bfloat16 or not x.is_cpu or x.shape[-1] != inputs:
            raise ValueError(
                f"a layer of {inputs} inputs in bfloat16 on a CPU got {list(x.shape)} "
                f"in {x.dtype} on {x.device}"
            )
        return x.contiguous()


def lay_out(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] as the library reads it: [panels, inputs / 2, PANEL], two inputs'
    numbers side by side in an int32; past the last output, zeros."""
    pairs = weight.contiguous().view(torch.int32)
    laid_out = pairs.new_zeros((-(-len(pairs) // PANEL), pairs.shape[1], PANEL))
    for panel, rows in zip(laid_out, pairs.split(PANEL), strict=True):
        panel[:, : len(rows)] = rows.t()
    return laid_out


def gated(gate: PanelLinear, up: PanelLinear, x: Tensor) -> Tensor:
    """`silu(gate(x)) * up(x)`, rounded once; neither product goes through memory."""
    x = up.checked(x)
    out = x.new_empty((*x.shape[:-1], up.struct.outputs))
    tokens, threads = x.numel() // up.struct.inputs, torch.get_num_threads()
    structs = ctypes.byref(gate.struct), ctypes.byref(up.struct)
    library().gated(x.data_ptr(), *structs, out.data_ptr(), tokens, threads)
    return out


def can_lay_out(linear: nn.Linear) -> bool:
    """Whether a layer's products are the library's."""
    weight = linear.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
        and not cpu_kernels.has_tiles()
        and works()
    )


@cache
def works() -> bool:
    """Whether the library can be had and multiplies as it should."""
    return cpu_library.kernels_work(agrees, "oneDNN multiplies all layers")


@torch.inference_mode()
@torch.random.fork_rng(devices=[])
def agrees() -> bool:
    """Whether the library's layers give what float64 gives, on a few random numbers."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(70, 90, dtype=torch.bfloat16)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer, x = PanelLinear(linear), torch.randn((103, 70), generator=generator).bfloat16()
    want = x.double() @ linear.weight.double().T + linear.bias.double()
    pairs = (layer(x), want), (gated(layer, layer, x), F.silu(want) * want)
    return all(torch.allclose(got.double(), want, atol=0.03, rtol=0.03) for got, want in pairs)
