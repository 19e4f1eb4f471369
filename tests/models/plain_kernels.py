"""What a GPU's kernels of layers are documented to do, as plain operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff_kserve.models import fp8, fused

Kernel = Callable[..., Any]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x + other, rms_norm(x + other, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.tensor_split((cos.shape[-1],), dim=-1)
    swapped = turned.roll(cos.shape[-1] // 2, dims=-1)
    return torch.cat(((turned * cos + swapped * sin).to(x.dtype), rest), dim=-1)


def heads(
    joined: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    norms: fused.HeadNorms | None,
    kept: fused.Kept | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = joined.split([joined.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query = rms_norm(query, norms.query, norms.eps)
        key = rms_norm(key, norms.key, norms.eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if kept is not None:
        kept.keys[kept.places] = key
        kept.values[kept.places] = value
    return query, key, value


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rounded = fp8._round_plainly(x)
    return rounded.values, rounded.scales


def round_norm(
    x: Tensor, other: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if other is None else x + other
    return total, *round_rows(rms_norm(total, weight, eps))


def round_product(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return round_rows(silu_product(gate, up))


def use_plain_kernels(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Kernel], Kernel] = lambda kernel: kernel
) -> None:
    """Let layers run as on a GPU, with these kernels in what `wrap` makes of them."""
    monkeypatch.setattr(fused, "usable", lambda x: x.is_contiguous())
    monkeypatch.setattr(fused, "rounds", lambda _: True)
    layers = (rms_norm, add_rms_norm, rotate, heads, silu_product)
    for kernel in (*layers, round_rows, round_norm, round_product):
        monkeypatch.setattr(fused, kernel.__name__, wrap(kernel))
