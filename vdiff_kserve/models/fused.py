"""What stands between a layer's matrix products as one GPU kernel each.

torch runs a norm as two kernels, a rotation as four, a gated activation as two. In a cached pass of
few rows, whose matrix products do little but read weights, that many launches cost as much as a
fifth of the products; in a long pass, they move more than they need. The kernels are Triton's,
which needs a C compiler. Where they cannot be had, or do not give what they should, the plain
operations run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff_kserve.gpu import kernels_work

DTYPES = (torch.bfloat16, torch.float16)
LARGEST = 16384
"""Most elements that one program reads."""
PRODUCT_BLOCK = 1024
ELEMENTS_PER_WARP = 512


def usable(x: Tensor) -> bool:
    """Whether operations on `x`, [..., size] or [tokens, heads, size], take the kernels."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.shape[1:].numel() <= LARGEST
        and not torch.is_grad_enabled()
        and x.device.index == torch.cuda.current_device()
        and works(x.device)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`, over the last dimension."""
    out, size = torch.empty_like(x), x.shape[-1]
    block = _power_of_2(size)
    _kernels().rms_norm_kernel[(x.numel() // size,)](
        x, weight, out, size, eps, BLOCK=block, num_warps=_warps(block)
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `layers.rotate`."""
    out, (tokens, heads, size) = torch.empty_like(x), x.shape
    rows, block = _power_of_2(heads), _power_of_2(size)
    _kernels().rotate_kernel[(tokens,)](
        x,
        cos,
        sin,
        out,
        heads,
        size,
        cos.shape[-1],
        HEADS=rows,
        BLOCK=block,
        num_warps=_warps(rows * block),
    )
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both contiguous."""
    out, count = torch.empty_like(gate), gate.numel()
    _kernels().silu_product_kernel[(-(-count // PRODUCT_BLOCK),)](
        gate, up, out, count, BLOCK=PRODUCT_BLOCK, num_warps=_warps(PRODUCT_BLOCK)
    )
    return out


@cache
def works(device: torch.device) -> bool:
    """Whether the kernels compile for this GPU and compute what they should."""
    return kernels_work(lambda: agrees(device), "Layers run without fused kernels")


def agrees(device: torch.device) -> bool:
    """Whether the kernels give what float64 gives, on a few random numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((6, 5, 24), generator=generator).to(device, torch.bfloat16)
    weight, cos, sin = x[0, 0], *torch.randn((2, 6, 1, 16), generator=generator).to(device)
    wide = x.double()
    turned, rest = wide.tensor_split((16,), dim=-1)
    scale = (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    rotated = turned * cos + turned.roll(8, dims=-1) * sin
    pairs = (
        (rms_norm(x, weight, 1e-5), wide * scale * weight.double()),
        (rotate(x, cos, sin), torch.cat((rotated, rest), dim=-1)),
        (silu_product(x, x.flip(0)), F.silu(wide) * wide.flip(0)),
    )
    return all(torch.allclose(got.double(), want, atol=0.02, rtol=0.03) for got, want in pairs)


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _warps(elements: int) -> int:
    return min(16, max(1, elements // ELEMENTS_PER_WARP))


@cache
def _kernels() -> Any:
    """Their module; Triton comes with torch's builds for GPUs only."""
    from vdiff_kserve.models import fused_kernels

    return fused_kernels
