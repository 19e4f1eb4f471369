"""Linear layers in 8-bit floating point (e4m3, as in arXiv 2209.05433): weights and activations.

A weight has a scale for each output, set when it is loaded; an activation one for each token, set
when it is computed ("W8A8, dynamic, per token and channel"). A token's result therefore depends on
no other token, but for the order in which a GPU's product adds up. GPUs multiply such numbers twice
as fast as bfloat16. Elsewhere the same rounded numbers are multiplied after they are widened: the
same arithmetic, at the cost of the widening.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve.models import fused
from vdiff_kserve.models.fused import FP8, LARGEST_FP8, LEAST_FP8_SCALE

CAPABILITY = (8, 9)
"""Of a GPU that multiplies e4m3 numbers: Ada."""
MULTIPLE = 16
"""What the sizes of a weight must be multiples of, for `torch._scaled_mm`."""
TRIED_TOKENS = (1, 7, 33, 256)
"""Numbers of tokens that a product is tried with before it is used."""
SIGN_AND_NUMBER = 0x87F0 - (1 << 16)
"""Bits that an e4m3 number takes in bfloat16, as int16."""
ROWS = 2048
"""Of a weight are rounded at a time, which bounds the memory that this takes."""

logger = logging.getLogger("kserve.vdiff.engine")


@dataclass(frozen=True)
class Rounded:
    """Activations in fp8.

    Attributes:
        values: e4m3 [tokens, size].
        scales: float32 [tokens, 1]; `values * scales` is what was rounded.
        dtype: its number type, in which products come out.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __getitem__(self, tokens: Tensor) -> Rounded:
        """Those of some tokens."""
        values = self.values.view(torch.uint8)[tokens].view(FP8)
        return Rounded(values, self.scales[tokens], self.dtype)


Activations = Tensor | Rounded


def takes_kernels(x: Activations) -> bool:
    """Whether operations on what a layer makes of `x` take the kernels of `fused`."""
    return fused.usable(x.values.view(x.dtype) if isinstance(x, Rounded) else x)


def round_rows(x: Tensor) -> Rounded:
    """Round each row of `x` [tokens, size] by itself."""
    if fused.rounds(x) and x.is_contiguous():
        return Rounded(*fused.round_rows(x), x.dtype)
    return _round_plainly(x)


def round_product(gate: Tensor, up: Tensor) -> Rounded:
    """`silu(gate) * up`, rounded; rows may lie apart, equally far in both."""
    if fused.rounds(gate) and gate.stride() == up.stride():
        return Rounded(*fused.round_product(gate, up), gate.dtype)
    return _round_plainly(F.silu(gate) * up)


def _round_plainly(x: Tensor) -> Rounded:
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST_FP8).clamp(min=LEAST_FP8_SCALE)
    values = (wide / scales).clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8)
    return Rounded(values, scales, x.dtype)


def multiply(x: Activations, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer's product, in the number type of `x`.

    Args:
        x: [tokens, inputs]; rounded first if it is not.
        weight: e4m3 [outputs, inputs], both multiples of `MULTIPLE`; `scales` float32 [outputs].
        bias: [outputs], in the number type of `x`.
    """
    rounded = x if isinstance(x, Rounded) else round_rows(x)
    if weight.is_cuda and multiplies(weight.device, *weight.shape):
        return _multiply_natively(rounded, weight, scales, bias)
    return _multiply_plainly(rounded, weight, scales, bias)


def _multiply_natively(x: Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Products come out in bfloat16, which torch has kernels for on every GPU. The bias is added to
    them: with it, cuBLAS refuses some numbers of tokens."""
    product = torch._scaled_mm(
        x.values,
        weight.t(),
        x.scales,
        scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(x.dtype)
    return product if bias is None else product.add_(bias)


def _multiply_plainly(x: Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """With the numbers widened to bfloat16, which holds all of them, or float32."""
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    product = F.linear(x.values.to(wide), widen(weight).to(wide)) * x.scales * scales
    return (product if bias is None else product + bias).to(x.dtype)


def widen(finite: Tensor) -> Tensor:
    """Numbers of e4m3 in bfloat16, exactly, in a tenth of the time that torch takes on a CPU.

    The bits of an e4m3 number, shifted to where bfloat16 has exponent and fraction, are the number
    times 2 ** -120, as exponents begin at -7 and -127.
    """
    bits = finite.view(torch.int8).to(torch.int16).mul_(1 << 4).bitwise_and_(SIGN_AND_NUMBER)
    return bits.view(torch.bfloat16).mul_(2.0**120)


@cache
def multiplies(device: torch.device, outputs: int, inputs: int) -> bool:
    """Whether this GPU and this torch multiply e4m3 weights of this size, and rightly. The log says
    so if not."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        if agrees(device, outputs, inputs):
            return True
        reason = "the product is wrong"
    except RuntimeError as error:  # of cuBLAS, which takes some sizes and not others
        reason = str(error)
    logger.warning(
        "Layers of %d inputs and %d outputs are computed in a wider type than fp8: %s",
        inputs,
        outputs,
        reason,
    )
    return False


@torch.inference_mode()
def agrees(device: torch.device, outputs: int, inputs: int) -> bool:
    """Whether the native product gives what the plain one gives for a few numbers of tokens, with
    some random outputs that repeat, so that this takes little time and memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((max(TRIED_TOKENS), inputs), generator=generator)
    x *= torch.arange(1, len(x) + 1)[:, None]
    few = Fp8Linear(inputs, MULTIPLE)
    few.fill(torch.randn((MULTIPLE, inputs), generator=generator).to(device))
    times = outputs // MULTIPLE
    weight = few.weight.view(torch.uint8).repeat(times, 1).view(FP8)
    for tokens in TRIED_TOKENS:
        rounded = _round_plainly(x[:tokens].to(device, torch.bfloat16))
        got = _multiply_natively(rounded, weight, few.scales.repeat(times), None)
        want = _multiply_plainly(rounded, few.weight, few.scales, None).repeat(1, times)
        if (got - want).float().norm() > 0.02 * want.float().norm():
            return False
    return True


class Fp8Linear(nn.Module):
    """`nn.Linear` for inference, in fp8.

    Attributes:
        weight: e4m3 [outputs, inputs].
        scales: float32 [outputs].
        bias: [outputs], in the model's number type, or None.
    """

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None = None) -> None:
        """Without memory for the weight yet; `fill` or `JoinedLinear.join` gives it."""
        super().__init__()
        weight = torch.empty((outputs, inputs), dtype=FP8, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        scales = torch.empty(outputs, dtype=torch.float32, device="meta")
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = bias

    def fill(self, weight: Tensor) -> None:
        """Take the value of `weight` [outputs, inputs], rounded, on its device."""
        if self.weight.is_meta:
            for name in ("weight", "scales"):
                own = torch.empty_like(self.get_parameter(name), device=weight.device)
                setattr(self, name, nn.Parameter(own, requires_grad=False))
        parts = zip(*(each.split(ROWS) for each in (weight, self.weight, self.scales)), strict=True)
        for part, values, scales in parts:
            rounded = _round_plainly(part)
            values.copy_(rounded.values)
            scales.copy_(rounded.scales[:, 0])

    def forward(self, x: Activations) -> Tensor:
        return multiply(x, self.weight, self.scales, self.bias)


def takes(layer: nn.Linear) -> bool:
    """Whether the layer's sizes are those that GPUs multiply in fp8."""
    return layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0


def use_fp8(module: nn.Module) -> list[str]:
    """Put `Fp8Linear` without values in place of the linear layers inside `module` that it can be.

    Returns:
        the names of those that stay, whose sizes do not fit.
    """
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    for name, layer in layers:
        if takes(layer):
            parent, _, own = name.rpartition(".")
            fp8 = Fp8Linear(layer.in_features, layer.out_features, layer.bias)
            setattr(module.get_submodule(parent), own, fp8)
    return [name for name, layer in layers if not takes(layer)]
