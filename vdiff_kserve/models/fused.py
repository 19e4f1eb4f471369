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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`, over the last dimension."""
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + other`, both contiguous, and its norm."""
    return _norm(x, other, weight, eps)


def _norm(x: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, size = torch.empty_like(x), x.shape[-1]
    block, adds = power_of_2(size), other is not None
    total = torch.empty_like(x) if adds else x
    _kernels().rms_norm_kernel[(x.numel() // size,)](
        x,
        x if other is None else other,
        weight,
        total,
        out,
        size,
        eps,
        ADDS=adds,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return total, out


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


def _warps(elements: int) -> int:
    return min(16, max(1, elements // ELEMENTS_PER_WARP))


@cache
def _kernels() -> Any:
    """Their module; Triton comes with torch's builds for GPUs only."""
    from vdiff_kserve.models import fused_kernels

    return fused_kernels
