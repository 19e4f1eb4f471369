"""Layers that every decoder family shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve.models import cpu_kernels, fp8, fused
from vdiff_kserve.models.batch import AttentionGroup
from vdiff_kserve.models.fp8 import Activations, Rounded
from vdiff_kserve.models.joined_linear import JoinedLinear
from vdiff_kserve.models.matmul_attention import attend_row, prefers_products
from vdiff_kserve.models.packed_linear import gated_linear


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, cast back, then scaled by the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fused.usable(x):
            return fused.rms_norm(x, self.weight, self.eps)
        if cpu_kernels.usable(x):
            return cpu_kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight

    def of_sum(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """`x + other`, and its norm."""
        if fused.usable(x) and other.is_contiguous():
            return fused.add_rms_norm(x, other, self.weight, self.eps)
        if cpu_kernels.usable(x) and other.is_contiguous():
            return cpu_kernels.add_rms_norm(x, other, self.weight, self.eps)
        total = x + other
        return total, self(total)

    def rounded(self, x: Tensor, other: Tensor | None) -> tuple[Tensor, Rounded]:
        """`x`, with `other` added unless it is None, and its norm in fp8."""
        if fused.rounds(x) and x.is_contiguous() and (other is None or other.is_contiguous()):
            total, values, scales = fused.round_norm(x, other, self.weight, self.eps)
            return total, Rounded(values, scales, x.dtype)
        total, normed = (x, self(x)) if other is None else self.of_sum(x, other)
        return total, fp8.round_rows(normed)


class GatedMLP(JoinedLinear):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    joinable = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Activations) -> Tensor:
        if self.in_fp8:
            return self._in_fp8(x if isinstance(x, Rounded) else fp8.round_rows(x))
        assert isinstance(x, Tensor)
        if fused.usable(x):
            if self.is_joined:
                gate, up = self.multiply_joined(x).chunk(2, dim=-1)
            else:
                gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(fused.silu_product(gate, up))
        return self.down_proj(gated_linear(self.gate_proj, self.up_proj, x))

    def _in_fp8(self, x: Rounded) -> Tensor:
        if self.is_joined:
            gate, up = self.multiply_joined(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(fp8.round_product(gate, up))


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation, as `rotate` takes them.

    Args:
        positions: int64 [tokens].
        rotary_dim: dimensions of a head that are rotated.

    Returns:
        two float32 tensors [tokens, 1, rotary_dim]; the first half of the sine is negated.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    inverse_frequencies = 1.0 / theta ** (exponents / rotary_dim)
    angles = (positions.float()[:, None] * inverse_frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the "half" layout, in the dtype of `cos`, returned in the dtype of `x`.

    Args:
        x: [tokens, heads, head_dim].
        cos: [tokens, 1, rotary_dim], as `sin`: those of `rotary_angles`. Dimensions beyond
            `rotary_dim` stay as they are.
    """
    if fused.usable(x):
        return fused.rotate(x, cos, sin)
    if cpu_kernels.usable(x):
        return cpu_kernels.rotate(x, cos, sin)
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        first, rest = x.tensor_split((rotary_dim,), dim=-1)
        return torch.cat((rotate(first, cos, sin), rest), dim=-1)
    swapped = x.roll(rotary_dim // 2, dims=-1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: list[AttentionGroup],
    cached: tuple[Tensor, Tensor] | None,
    block: int | None,
) -> Tensor:
    """Attention inside each row; rows never see each other.

    Args:
        query: [query tokens, heads, head_dim], rows end to end.
        key: [tokens, kv heads, head_dim], of the forward pass itself; as `value`.
        groups: the rows' shapes, in order.
        cached: this layer's cached keys and values, [places, kv heads, head_dim] each.
        block: None lets each query see all keys; n only those of its own and earlier blocks of n
            positions, counted from the row's first. The queries are then the last of the keys.

    Returns:
        [query tokens, heads * head_dim]
    """
    outputs: list[Tensor] = []
    q_start, k_start = 0, 0
    for group in groups:
        q_end = q_start + group.rows * group.queries
        k_end = k_start + group.rows * group.tokens
        mask = None
        if block is not None:
            mask = block_causal_mask(group.queries, group.keys, block, query.device)
        q = query[q_start:q_end]
        if group.cache_offsets is None:
            k, v = key[k_start:k_end], value[k_start:k_end]
            outputs += _attend_fresh(q, k, v, group, mask)
        else:
            assert cached is not None
            outputs += _attend_at(q, *cached, group.cache_offsets, group, mask)
        q_start, k_start = q_end, k_end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_fresh(
    query: Tensor, key: Tensor, value: Tensor, group: AttentionGroup, mask: Tensor | None
) -> list[Tensor]:
    """Rows of one shape that lie end to end with their keys."""
    if prefers_products(query, group.queries, group.keys):
        return _attend_at(query, key, value, range(0, len(key), group.tokens), group, mask)
    q, k, v = (t.unflatten(0, (group.rows, -1)).transpose(1, 2) for t in (query, key, value))
    return [_merge_heads(_attend_heads(q, k, v, mask))]


def _attend_at(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Sequence[int],
    group: AttentionGroup,
    mask: Tensor | None,
) -> list[Tensor]:
    """Rows of one shape whose keys begin at places of their own; reading them there costs less than
    gathering them for one call."""
    rows = zip(query.split(group.queries), offsets, strict=True)
    if prefers_products(query, group.queries, group.keys):
        return [
            attend_row(
                row, keys.narrow(0, place, group.keys), values.narrow(0, place, group.keys), mask
            )
            for row, place in rows
        ]
    k, v = (stored.transpose(0, 1)[None] for stored in (keys, values))
    return [
        _merge_heads(
            _attend_heads(
                row.transpose(0, 1)[None],
                k.narrow(2, place, group.keys),
                v.narrow(2, place, group.keys),
                mask,
            )
        )
        for row, place in rows
    ]


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention; all are [rows, heads, tokens, head_dim]."""
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)


def _merge_heads(attended: Tensor) -> Tensor:
    """[rows, heads, queries, head_dim] -> [rows * queries, heads * head_dim]"""
    return attended.transpose(1, 2).flatten(0, 1).flatten(1)


def block_causal_mask(queries: int, keys: int, block: int, device: torch.device) -> Tensor | None:
    """What the last `queries` of `keys` positions see: bool [queries, keys]; None is everything."""
    if (keys - queries) // block == (keys - 1) // block:
        return None
    key_blocks = torch.arange(keys, device=device) // block
    return key_blocks[keys - queries :, None] >= key_blocks
