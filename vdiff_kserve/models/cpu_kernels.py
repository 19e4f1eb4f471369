"""What stands between a layer's matrix products, and attention, on a CPU that multiplies bfloat16.

torch runs a norm as eight operations there, a rotation as four, and attention row by row and head
by head: layers of small heads spend most of their time outside of their matrix products. The
kernels are those of `cpu_library`, and run on torch's own threads. Where they cannot be had, or do
not give what they should, torch's operations run.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdiff_kserve import cpu_library
from vdiff_kserve.cpu_library import addresses, cpu_flags, library

if TYPE_CHECKING:
    from vdiff_kserve.models.batch import SeenKeys
    from vdiff_kserve.models.language_model import LanguageModel

LANES = 16
"""Queries that a kernel computes at once; a head's size is a multiple of it."""

NUMBERS_PER_THREAD = 1 << 15

LEAST_FILLED = 8
"""Of the lanes that make attention faster than torch's."""


def usable(x: Tensor) -> bool:
    """Whether operations on `x` take the kernels."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and works()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`, over the last dimension."""
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + other`, both contiguous, and its norm."""
    return _norm(x, other, weight, eps)


def _norm(x: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, size = torch.empty_like(x), x.shape[-1]
    total = x if other is None else torch.empty_like(x)
    tensors = addresses(x, other, weight, total, out)
    library().rms_norm(*tensors, x.numel() // size, size, eps, _threads(x.numel()))
    return total, out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `layers.rotate`, computed in float32."""
    out, cos, sin = torch.empty_like(x), cos.float(), sin.float()
    tensors = addresses(x, cos, sin, out)
    library().rotate(*tensors, *x.shape, cos.shape[-1], _threads(x.numel()))
    return out


def keep(fresh: Tensor, tokens: Tensor | None, places: Tensor, stored: Tensor) -> None:
    """`stored[places] = fresh[tokens]`; without `tokens`, all of `fresh`.

    Args:
        fresh: [any number, kv heads, head_dim], contiguous, as `stored`.
        tokens: int64 [n], as `places`.
    """
    tensors = addresses(fresh, tokens, places, stored)
    size = stored[0].numel()
    library().keep(*tensors, len(places), size, _threads(len(places) * size))


def can_attend(query: Tensor, key: Tensor, value: Tensor, seen: SeenKeys) -> bool:
    """Whether `attend` takes these, and is faster than torch's attention."""
    group, size = query.shape[1] // key.shape[1], query.shape[2]
    return fills_lanes(seen, group, size) and all(map(usable, (query, key, value)))


def fills_lanes(seen: SeenKeys, group: int, size: int) -> bool:
    """Whether queries that see the same keys are many enough for `attend`. Rows of a diffusion
    model do not depend on the rest of their batch, so this does not, either.

    Args:
        group: query heads to a head of keys.
        size: of a head.
    """
    if size % LANES or has_tiles():
        return False
    is_next_token = seen.block == 1 and seen.parts == seen.rows  # of causal rows
    return seen.block is None or seen.block * group >= LEAST_FILLED or is_next_token


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached: tuple[Tensor, Tensor] | None,
    seen: SeenKeys,
) -> Tensor:
    """Attention inside each row, as `layers.attend` computes it, of all rows in one call.

    Args:
        query: [query tokens, heads, head_dim], rows end to end.
        key: [tokens, kv heads, head_dim], of the pass itself; as `value`.
        cached: this layer's cached keys and values, [places, kv heads, head_dim] each.

    Returns:
        [query tokens, heads * head_dim]
    """
    queries, heads, size = query.shape
    out = query.new_empty((queries, heads * size))
    keys, values = (None, None) if cached is None else cached
    tensors = addresses(query, key, value, keys, values, seen.numbers)
    shape = seen.parts, heads, key.shape[1], size
    library().attend(*tensors, *shape, out.data_ptr(), torch.get_num_threads())
    return out


def _threads(numbers: int) -> int:
    """Threads that share the work on so many numbers: one where few are soon done, as in torch."""
    return max(1, min(torch.get_num_threads(), numbers // NUMBERS_PER_THREAD))


@cache
def has_tiles() -> bool:
    """Whether torch uses tiles of this processor, which multiply faster than its vectors."""
    return "amx_bf16" in cpu_flags()


def get_kernels_ready(decoder: LanguageModel) -> None:
    """Have the kernels that a decoder's passes take, if any, before a pass is timed."""
    if decoder.device.type == "cpu" and decoder.dtype == torch.bfloat16:
        works()


@cache
def works() -> bool:
    """Whether the kernels can be had and compute what they should."""
    return cpu_library.kernels_work(agrees, "Layers run without kernels for this CPU")


@torch.inference_mode()
def agrees() -> bool:
    """Whether the kernels give what float64 gives, on a few random numbers."""
    from vdiff_kserve.models.batch import SeenKeys

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x, weight, cos, sin = normal(6, 4, 48), normal(48), normal(6, 1, 32), normal(6, 1, 32)
    wide, reverse = x.double(), x.flip(0)

    def norm(of: Tensor) -> Tensor:
        return of * (of.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    turned, rest = wide.tensor_split((32,), dim=-1)
    rotated = torch.cat((turned * cos + turned.roll(16, dims=-1) * sin, rest), dim=-1)
    total, normed = add_rms_norm(x, reverse, weight, 1e-5)
    places, tokens = torch.tensor([7, 0, 3]), torch.tensor([5, 1, 2])
    stored = torch.zeros((8, 4, 48), dtype=torch.bfloat16)
    keep(x, tokens, places, stored)
    key, value = normal(6, 2, 48), normal(6, 2, 48)
    cached = normal(700, 2, 48), normal(700, 2, 48)
    seen = SeenKeys(torch.tensor([(0, 2, 0, 0, 3), (2, 4, 1, 9, 601)]), 2, None)
    pairs = (
        (rms_norm(x, weight, 1e-5), norm(wide)),
        (total, wide + reverse.double()),
        (normed, norm(total.double())),
        (rotate(x, cos, sin), rotated),
        (stored[places], x[tokens]),
        (
            attend(x, key, value, cached, seen),
            torch.cat(
                (
                    _attended(x[:2], key[:3], value[:3]),
                    _attended(x[2:], cached[0][9:610], cached[1][9:610]),
                )
            ),
        ),
    )
    return all(
        torch.allclose(got.double(), want.double(), atol=0.03, rtol=0.03) for got, want in pairs
    )


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one row's queries to all keys, in float64: [queries, heads * head_dim]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.double().transpose(0, 1) for t in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = (q @ k.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)
