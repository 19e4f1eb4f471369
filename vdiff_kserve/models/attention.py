"""Attention over packed rows on a GPU: one kernel call per layer, whatever the rows' lengths.

Rows are told apart by where their queries and keys begin and end (`cu_seqlens`, as FlashAttention's
variable-length kernels take them), so nothing is padded. Keys in the cache are read where they lie:
between two rows' keys stands a sequence without queries, which covers the places that are not
theirs and costs nothing. Few queries over many keys have a kernel of their own; it also takes
sequences that share keys, as the blocks of a row do when each sees itself and all to its left.
What neither can do goes to `layers.attend`, which can do all.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.models import split_attention

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that FlashAttention-2 runs on: Ampere."""


@dataclass(frozen=True)
class VarlenCall:
    """The sequences of one kernel call.

    Attributes:
        cu_queries: int32 [sequences + 1], where each sequence's queries begin, and the end.
        cu_keys: int32 [sequences + 1], the same of its keys.
        max_queries: a bound of a sequence's queries, 2 at least: at 1, FlashAttention-2 takes for
            granted that every sequence has exactly one.
        max_keys: a bound of a sequence's keys.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class PackedRows:
    """How the rows of a pass are computed by at most two calls.

    Attributes:
        fresh: rows whose keys are those of the pass itself; they come first. None without any.
        cached: rows whose keys lie in the cache, in its order. None without any.
        fresh_queries: query tokens of the first call; `fresh_keys` are its tokens.
        is_ordered: whether runs of keys are disjoint and ascending, as torch's kernel takes them.
    """

    fresh: VarlenCall | None
    cached: VarlenCall | None
    fresh_queries: int
    fresh_keys: int
    is_ordered: bool = True


def sequences_of(
    queries: Sequence[int], key_starts: Sequence[int], keys: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Where the sequences of rows with keys at places of their own begin: `cu_seqlens` twice.

    Every row has two sequences: one without queries up to its first key, and its own.

    Args:
        key_starts: place of each row's first key.
    """
    cu_queries, cu_keys = [0], [0]
    for count, start, length in zip(queries, key_starts, keys, strict=True):
        cu_queries += [cu_queries[-1], cu_queries[-1] + count]
        cu_keys += [start, start + length]
    return cu_queries, cu_keys


Part = tuple[int, int]
"""Queries of a row that follow each other and see the same keys: how many, and how many keys."""


def pack_rows(
    parts: Sequence[Sequence[Part]],
    tokens: Sequence[int],
    keys: Sequence[int],
    offsets: Sequence[int | None],
    device: torch.device,
) -> PackedRows | None:
    """The calls for rows that lie end to end; None for rows that no call can take.

    Args:
        parts: of the query tokens of each row.
        tokens: how many of each row the pass computes; `keys` are those that the row sees.
        offsets: where each row's keys begin in the cache; None for a row that has none there.
    """
    uncached = sum(offset is None for offset in offsets)
    places = [offset for offset in offsets[uncached:] if offset is not None]
    ends = [place + count for place, count in zip(places, keys[uncached:], strict=False)]
    is_ordered = all(len(row) == 1 for row in parts) and all(
        end <= place for end, place in zip(ends, places[1:], strict=False)
    )
    whole = list(tokens[:uncached]) == list(keys[:uncached])
    if len(places) < len(offsets) - uncached or not whole:
        return None
    fresh = cached = None
    if uncached:
        starts = list(accumulate(tokens[:uncached], initial=0))[:-1]
        fresh = _call(parts[:uncached], starts, device)
    if places:
        cached = _call(parts[uncached:], places, device)
    queries = sum(count for row in parts[:uncached] for count, _ in row)
    return PackedRows(fresh, cached, queries, sum(tokens[:uncached]), is_ordered)


def _call(
    parts: Sequence[Sequence[Part]], key_starts: Sequence[int], device: torch.device
) -> VarlenCall:
    starts = [start for row, start in zip(parts, key_starts, strict=True) for _ in row]
    queries, keys = zip(*(part for row in parts for part in row), strict=True)
    both = torch.tensor(sequences_of(queries, starts, keys), dtype=torch.int32)
    cu_queries, cu_keys = to_device(both, device)
    return VarlenCall(cu_queries, cu_keys, max(2, *queries), max(keys))


def can_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PackedRows,
    cached: tuple[Tensor, Tensor] | None,
) -> bool:
    """Whether `attend_packed` takes these: keys in no order want the kernel for few queries."""
    if rows.is_ordered:
        return True
    fresh = rows.fresh is None or split_attention.usable(query, key, value, rows.fresh)
    if rows.cached is None:
        return fresh
    assert cached is not None
    return fresh and split_attention.usable(query, *cached, rows.cached)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PackedRows,
    cached: tuple[Tensor, Tensor] | None,
    causal: bool,
) -> Tensor:
    """Attention inside each row, as `layers.attend` computes it.

    Args:
        query: [query tokens, heads, head_dim], rows end to end.
        key: [tokens, kv heads, head_dim], of the pass itself; as `value`.
        cached: this layer's cached keys and values, [places, kv heads, head_dim] each.
        causal: whether a query sees only the keys up to its own.

    Returns:
        [query tokens, heads * head_dim]
    """
    outputs = []
    if rows.fresh is not None:
        own = slice(rows.fresh_keys)
        q = query[: rows.fresh_queries]
        outputs.append(run_kernel(q, key[own], value[own], rows.fresh, causal))
    if rows.cached is not None:
        assert cached is not None
        outputs.append(run_kernel(query[rows.fresh_queries :], *cached, rows.cached, causal))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.flatten(1)


def run_kernel(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, causal: bool) -> Tensor:
    """One call of a kernel for rows of any length: [queries, heads, head_dim]."""
    if not causal and split_attention.usable(query, key, value, call):
        return split_attention.attend(query, key, value, call)
    return run_long_kernel(query, key, value, call, causal)


def run_long_kernel(
    query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, causal: bool
) -> Tensor:
    """One call of torch's variable-length attention."""
    attended = _kernel()(
        query,
        key,
        value,
        call.cu_queries,
        call.cu_keys,
        call.max_queries,
        call.max_keys,
        **_options(query.shape[1] != key.shape[1], causal),
    )
    assert isinstance(attended, Tensor), "no auxiliary output was asked for"
    return attended


@cache
def _kernel() -> Callable[..., Any]:
    """torch's variable-length attention. Its module brings torch's compiler along, so that a server
    without a GPU starts a second earlier without it."""
    from torch.nn.attention.varlen import varlen_attn

    logging.getLogger(varlen_attn.__module__).setLevel(logging.WARNING)  # it tells of every call
    return varlen_attn


@cache
def _options(grouped: bool, causal: bool) -> dict[str, Any]:
    """The keywords of this torch's kernel: older ones take grouped heads without being told."""
    known = _parameters(_kernel())
    options: dict[str, Any] = {}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


@cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel takes heads of this size and number type on this device."""
    return (
        device.type == "cuda"
        and dtype in KERNEL_DTYPES
        and head_dim <= LARGEST_HEAD
        and head_dim % 8 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )
