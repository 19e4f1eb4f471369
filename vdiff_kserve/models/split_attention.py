"""Attention of few queries over many keys, as cached passes have it, on a GPU.

A kernel made for long passes takes queries in tiles of 128 and gives every head of a row to one
multiprocessor, which then goes through all keys alone: for one row's block most of the GPU is idle,
and a layer's attention takes as long as a fifth of its weights. Here tiles are as small as a block,
heads that share keys are in one tile, and where rows are few their keys are split among programs,
whose results are joined by a second kernel (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdiff_kserve.gpu import kernels_work, power_of_2

if TYPE_CHECKING:
    from vdiff_kserve.models.attention import VarlenCall

LONGEST = 64
"""Most queries of a row."""
KEYS = 64
"""Keys that a program reads at a time."""
TILES = (32, 64)
"""How many pairs of a query and a head, of those that share keys, a program takes."""
MAX_SPLITS = 16
PROGRAMS_PER_PROCESSOR = 2
"""As many as are wanted at once on each of a GPU's multiprocessors."""


def usable(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall) -> bool:
    """Whether `attend` takes these; dimensions as there."""
    heads, size = query.shape[1:]
    return (
        query.is_contiguous()
        and all(each.stride()[1:] == (size, 1) for each in (key, value))
        and not torch.is_grad_enabled()
        and takes(call.max_queries, query.device, query.dtype, size, heads // key.shape[1])
    )


def takes(queries: int, device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """Whether there is a kernel on this device for rows of so many queries and such heads."""
    return (
        queries <= LONGEST
        and device.type == "cuda"
        and device.index == torch.cuda.current_device()
        and works(device, dtype, size, group)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: VarlenCall,
    splits: int | None = None,
    tile: int | None = None,
) -> Tensor:
    """What the kernel for long passes computes: every query sees all keys of its sequence.

    Args:
        query: [query tokens, heads, head_dim].
        key: [places, kv heads, head_dim], as `value`; rows of a layer's cache, or of the pass.
        call: sequences in pairs, of which each first one has no queries, as `sequences_of` makes
            them.
        splits: among how many programs the keys of a row are split; None is as the GPU's size asks.
        tile: one of TILES; None is the least that takes all pairs, or the largest.

    Returns:
        as `query`. Tokens of a sequence without keys come out as 0, those of no sequence as
        anything.
    """
    kernels = _kernels()
    (tokens, heads, size), kv_heads = query.shape, key.shape[1]
    group, rows = heads // kv_heads, (len(call.cu_queries) - 1) // 2
    tile = tile or tile_of(call.max_queries * group)
    tiles = -(-call.max_queries * group // tile) * kv_heads
    if splits is None:
        splits = splits_of(tiles * rows, call.max_keys, _processors(query.device))
    out = torch.empty_like(query)
    parts = out if splits == 1 else query.new_empty((splits, *query.shape), dtype=torch.float32)
    weights = query.new_empty((splits, tokens, heads), dtype=torch.float32)
    columns = power_of_2(size)
    kernels.split_attention_kernel[(tiles, rows, splits)](
        query,
        key,
        value,
        call.cu_queries,
        call.cu_keys,
        parts,
        weights,
        key.stride(0),
        value.stride(0),
        math.log2(math.e) / math.sqrt(size),
        kv_heads,
        size,
        tokens,
        splits,
        GROUP=group,
        ROWS=tile,
        KEYS=KEYS,
        SIZE=columns,
        **options_of(tile, size),
    )
    if splits > 1:
        kernels.join_splits_kernel[(tokens * heads,)](
            parts,
            weights,
            out,
            tokens * heads,
            size,
            splits,
            SPLITS=MAX_SPLITS,
            SIZE=columns,
            num_warps=2,
        )
    return out


def tile_of(pairs: int) -> int:
    """The tile for so many pairs."""
    return next((tile for tile in TILES if pairs <= tile), TILES[-1])


def options_of(tile: int, size: int) -> dict[str, int]:
    """How the kernel is launched: a warp takes sixteen pairs, as a tensor core does, and keys are
    fetched ahead as far as there is room for them."""
    return {"num_warps": tile // 16, "num_stages": 3 if size <= 128 else 2}


def splits_of(programs: int, keys: int, processors: int) -> int:
    """Among how many programs the keys of each row are split, a power of 2.

    Args:
        programs: how many there are without splitting.
        keys: most of a row.
        processors: multiprocessors of the GPU.
    """
    wanted = min(MAX_SPLITS, PROGRAMS_PER_PROCESSOR * processors // programs, -(-keys // KEYS))
    return 1 << (max(1, wanted).bit_length() - 1)


@cache
def works(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """Whether the kernels compile for this GPU and these heads and compute what they should."""
    return kernels_work(
        lambda: agrees(device, dtype, size, group), "Cached passes attend as long ones do"
    )


def agrees(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """Whether attention over random keys is what float64 gives, of all that a pass may take."""
    from vdiff_kserve.models.attention import VarlenCall, sequences_of

    generator = torch.Generator().manual_seed(0)
    kv_heads, counts, starts, lengths = 2, (32, 9), (3, 250), (200, 40)
    query = torch.randn((sum(counts), kv_heads * group, size), generator=generator)
    key, value = torch.randn((2, 300, kv_heads, size), generator=generator)
    query, key, value = (each.to(device, dtype) for each in (query, key, value))
    bounds = torch.tensor(sequences_of(counts, starts, lengths), dtype=torch.int32).to(device)
    call = VarlenCall(bounds[0], bounds[1], max(counts), max(lengths))
    expected = []
    for own, start, length in zip(query.split(counts), starts, lengths, strict=True):
        k, v = (
            each[start : start + length].double().repeat_interleave(group, dim=1)
            for each in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", own.double(), k) / math.sqrt(size)
        expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
    return all(
        torch.allclose(
            attend(query, key, value, call, splits, tile).double(),
            torch.cat(expected),
            atol=0.02,
            rtol=0.03,
        )
        for splits, tile in itertools.product((1, 3), TILES)
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernels() -> Any:
    """Their module; Triton comes with torch's builds for GPUs only."""
    from vdiff_kserve.models import split_attention_kernels

    return split_attention_kernels
