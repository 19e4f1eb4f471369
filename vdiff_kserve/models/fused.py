"""What stands between a layer's matrix products as one GPU kernel each.

torch runs a norm as two kernels, a rotation as four, a gated activation as two. In a cached pass of
few rows, whose matrix products do little but read weights, that many launches cost as much as a
fifth of the products; in a long pass, they move more than they need. The kernels are Triton's,
which needs a C compiler. Where they cannot be had, or do not give what they should, the plain
operations run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff_kserve.gpu import kernels_work, power_of_2

DTYPES = (torch.bfloat16, torch.float16)
LARGEST = 16384
"""Most elements that one program reads."""
PRODUCT_BLOCK = 1024
ELEMENTS_PER_WARP = 512
HEADS = 8
"""Of one program."""
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
"""Of a GPU that has instructions for it: Ada."""
LARGEST_FP8 = 448.0
LEAST_FP8_SCALE = 1e-12
"""Of a row of zeros."""
LARGEST_ROW = 32768
"""Most elements of a row that is rounded by one program."""


def usable(x: Tensor) -> bool:
    """Whether operations on `x`, [..., size] or [tokens, heads, size], take the kernels."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.shape[-1] <= LARGEST
        and not torch.is_grad_enabled()
        and x.device.index == torch.cuda.current_device()
        and works(x.device)
    )


def rounds(x: Tensor) -> bool:
    """Whether rows of `x` [tokens, size], which may lie apart, are rounded by the kernels."""
    if x.shape[-1] > LARGEST_ROW:
        return False
    one = x if x.shape[-1] <= LARGEST and x.is_contiguous() else x[:1, :LARGEST]
    return usable(one) and rounding_works(x.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`, over the last dimension."""
    out = torch.empty_like(x)
    _norm(x, None, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + other`, both contiguous, and its norm."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, other, weight, eps, out, total)
    return total, out


def round_norm(
    x: Tensor, other: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, with `other` added unless it is None, and its norm in fp8: values and scales.

    Args:
        x: [tokens, size], contiguous, as `other`.

    Returns:
        the sum, e4m3 [tokens, size] and float32 [tokens, 1].
    """
    total = x if other is None else torch.empty_like(x)
    values, scales = _memory_for_fp8(x)
    _norm(x, other, weight, eps, values, total, scales)
    return total, values, scales


def _norm(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    size = x.shape[-1]
    block = power_of_2(size)
    _kernels().rms_norm_kernel[(x.numel() // size,)](
        x,
        x if other is None else other,
        weight,
        x if total is None else total,
        out,
        x if scales is None else scales,
        size,
        eps,
        ADDS=other is not None,
        ROUNDS=scales is not None,
        LARGEST=LARGEST_FP8,
        LEAST=LEAST_FP8_SCALE,
        BLOCK=block,
        num_warps=_warps(block),
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [tokens, size], contiguous, in fp8: e4m3 values, and float32 scales [tokens, 1]."""
    values, scales = _memory_for_fp8(x)
    block = power_of_2(x.shape[-1])
    _kernels().round_kernel[(len(x),)](
        x,
        values,
        scales,
        x.shape[-1],
        LARGEST=LARGEST_FP8,
        LEAST=LEAST_FP8_SCALE,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return values, scales


def round_product(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_product` in fp8: e4m3 values, and float32 scales [tokens, 1]."""
    values, scales = _memory_for_fp8(gate)
    block = power_of_2(gate.shape[-1])
    _kernels().round_product_kernel[(len(gate),)](
        gate,
        up,
        values,
        scales,
        gate.stride(0),
        gate.shape[-1],
        LARGEST=LARGEST_FP8,
        LEAST=LEAST_FP8_SCALE,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return values, scales


def _memory_for_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.empty((len(x), 1), device=x.device, dtype=torch.float32)
    return torch.empty(x.shape, device=x.device, dtype=FP8), scales


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `layers.rotate`."""
    query, _ = _heads(x, x.shape[1], 0, cos, sin, None, None)
    return query


@dataclass(frozen=True)
class HeadNorms:
    """Norms over each head of queries and keys.

    Attributes:
        query, key: the weights, [head_dim].
    """

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True)
class Kept:
    """Where keys and values of a pass are kept.

    Attributes:
        keys, values: [places, kv heads, head_dim], contiguous.
        places: int64 [tokens].
    """

    keys: Tensor
    values: Tensor
    places: Tensor


def heads(
    joined: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    norms: HeadNorms | None,
    kept: Kept | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of one product that has them all.

    Args:
        joined: [tokens, heads + 2 * kv heads, head_dim]: of queries, keys, then values.
        cos, sin: as `layers.rotate` takes them.
        norms: before the rotation; None without.
        kept: where keys and values are written besides; None is nowhere.

    Returns:
        queries [tokens, heads, head_dim], keys and values [tokens, kv heads, head_dim]; values are
        a part of `joined`.
    """
    own = joined.shape[1] - 2 * kv_heads
    query, key = _heads(joined, own, kv_heads, cos, sin, norms, kept)
    return query, key, joined[:, own + kv_heads :]


def _heads(
    x: Tensor,
    own: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    norms: HeadNorms | None,
    kept: Kept | None,
) -> tuple[Tensor, Tensor]:
    tokens, all_heads, size = x.shape
    query, key = x.new_empty((tokens, own, size)), x.new_empty((tokens, kv_heads, size))
    each, block = min(HEADS, power_of_2(all_heads)), power_of_2(size)
    _kernels().heads_kernel[(tokens, -(-all_heads // each))](
        x,
        cos,
        sin,
        x if norms is None else norms.query,
        x if norms is None else norms.key,
        query,
        key,
        x if kept is None else kept.places,
        x if kept is None else kept.keys,
        x if kept is None else kept.values,
        own,
        kv_heads,
        size,
        cos.shape[-1],
        0.0 if norms is None else norms.eps,
        NORMS=norms is not None,
        KEEPS=kept is not None,
        HEADS=each,
        BLOCK=block,
        num_warps=_warps(each * block),
    )
    return query, key


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, two dimensions each; their rows are equally far apart, without gaps in
    them."""
    rows, size = gate.shape
    out = gate.new_empty((rows, size))
    _kernels().silu_product_kernel[(rows, -(-size // PRODUCT_BLOCK))](
        gate,
        up,
        out,
        gate.stride(0),
        size,
        BLOCK=PRODUCT_BLOCK,
        num_warps=_warps(PRODUCT_BLOCK),
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
    wide, reverse = x.double(), x.flip(0)

    def norm(of: Tensor) -> Tensor:
        return of * (of.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    def turn(of: Tensor) -> Tensor:
        turned, rest = of.tensor_split((16,), dim=-1)
        return torch.cat((turned * cos + turned.roll(8, dims=-1) * sin, rest), dim=-1)

    places = torch.tensor([7, 0, 3, 1, 5, 2]).to(device)
    keys, values = torch.zeros((2, 8, 2, 24)).to(device, torch.bfloat16)
    norms, kept = HeadNorms(weight, weight, 1e-5), Kept(keys, values, places)
    query, key, value = heads(x, 2, cos, sin, norms, kept)
    total, normed = add_rms_norm(x, reverse, weight, 1e-5)
    rows, more = x[0].repeat(1, 2).chunk(2, dim=-1)
    pairs = (
        (rms_norm(x, weight, 1e-5), norm(wide)),
        (total, wide + reverse.double()),
        (normed, norm(total.double())),
        (rotate(x, cos, sin), turn(wide)),
        (torch.cat((query, key), dim=1), turn(norm(wide))[:, :3]),
        (
            torch.cat((keys[places], values[places], value), dim=1),
            torch.cat((key, x[:, 3:], x[:, 3:]), 1),
        ),
        (silu_product(rows, more), F.silu(wide[0]) * wide[0]),
    )
    return all(
        torch.allclose(got.double(), want.double(), atol=0.03, rtol=0.03) for got, want in pairs
    )


@cache
def rounding_works(device: torch.device) -> bool:
    """Whether the kernels that round to fp8 compile for this GPU and compute what they should."""
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return False
    return kernels_work(lambda: rounding_agrees(device), "fp8 is rounded without kernels")


def rounding_agrees(device: torch.device) -> bool:
    """Whether rounded rows are as near to what float64 gives as fp8 allows, on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn((2, 5, 80), generator=generator).to(device, torch.bfloat16)
    x = x * torch.tensor([1, 100, 1e-3, 0, 1], device=device, dtype=x.dtype)[:, None]
    total, *normed = round_norm(x, other, other[0], 1e-5)
    wide = total.double()
    norm = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * other[0].double()
    gate, up = torch.cat((x, other), dim=-1).chunk(2, dim=-1)
    pairs = (
        (round_rows(x), x.double()),
        (normed, norm),
        (round_product(gate, up), F.silu(x.double()) * other.double()),
    )
    return torch.allclose(wide, x.double() + other.double(), rtol=0.01) and all(
        bool(((values.double() * scales - want).abs() <= want.abs() / 14 + scales / 500).all())
        for (values, scales), want in pairs
    )


def _warps(elements: int) -> int:
    return min(32 if elements > LARGEST else 16, max(1, elements // ELEMENTS_PER_WARP))


@cache
def _kernels() -> Any:
    """Their module; Triton comes with torch's builds for GPUs only."""
    from vdiff_kserve.models import fused_kernels

    return fused_kernels
