"""What one forward pass computes: query tokens of many rows, what they see, what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.models.attention import PackedRows, Part, pack_rows


class RowSpan(NamedTuple):
    """The part of one row's canvas that a forward pass runs over.

    Attributes:
        start: canvas position of the first query token.
        queries: number of query tokens.
        keys: canvas positions 0 .. keys - 1 are what the queries see. Those outside the queries
            come from the cache.
        output_start: canvas position of the first wanted hidden state.
        outputs: number of wanted hidden states, all inside the query tokens.
        cache_offset: where the row's keys and values begin in the cache; None for a row without.
    """

    start: int
    queries: int
    keys: int
    output_start: int
    outputs: int
    cache_offset: int | None = None

    @classmethod
    def whole(cls, length: int) -> RowSpan:
        """All of a canvas, without a cache, every hidden state wanted."""
        return cls(0, length, length, 0, length)

    def parts(self, block: int | None, *, wanted: bool) -> list[Part]:
        """The queries, or those whose hidden states are wanted, by what they see.

        Args:
            block: None when each sees all keys; else it sees its own and earlier blocks of so many
                positions.
        """
        start, count = (self.output_start, self.outputs) if wanted else (self.start, self.queries)
        if block is None:
            return [(count, self.keys)]
        ends = range((start // block + 1) * block, start + count, block)
        bounds = [start, *ends, start + count]
        return [
            (end - first, min((first // block + 1) * block, self.keys))
            for first, end in pairwise(bounds)
        ]


@dataclass(frozen=True)
class KeyValueStore:
    """Memory for keys and values: two tensors [layers, tokens, kv heads, head_dim].

    Keys are stored rotated: a token's position in its canvas never changes.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class AttentionGroup:
    """Consecutive rows of one shape, computed by one attention call when nothing is cached.

    Attributes:
        rows: number of rows.
        tokens: tokens that the forward pass computes of each.
        queries: how many of them are queries (fewer than `tokens` in the last layer).
        keys: key tokens that each row's queries see.
        cache_offsets: where each row's keys begin in the cache; None when the keys are those of the
            query tokens themselves.
    """

    rows: int
    tokens: int
    queries: int
    keys: int
    cache_offsets: tuple[int, ...] | None


@dataclass(frozen=True)
class SeenKeys:
    """Which keys the queries of a pass see.

    Attributes:
        numbers: int64 [parts, 5] on the host, of queries that follow each other and see the same
            keys: the first one's place among the pass's queries and how many they are, whether
            the keys lie in the cache (1) or among the pass's own (0), and the first key's place
            there and how many they are.
        rows: rows of the pass.
        block: positions that see each other and what is before them; None when all see all.
    """

    numbers: Tensor
    rows: int
    block: int | None

    @property
    def parts(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class ForwardBatch:
    """Rows of different lengths laid end to end, without padding.

    Attributes:
        input_ids: int64 [tokens], the rows' query tokens one row after the other.
        spans: one per row.
        store: the cache that the spans' offsets point into; None when no span has one.
    """

    input_ids: Tensor
    spans: tuple[RowSpan, ...]
    store: KeyValueStore | None = None

    @classmethod
    def pack(
        cls,
        rows: Sequence[Tensor],
        spans: Sequence[RowSpan] | None = None,
        store: KeyValueStore | None = None,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """Lay parts of canvases end to end on `device`.

        Args:
            rows: whole canvases, int64 [length] each.
            spans: the part of each that is computed; None computes all of them.
        """
        if spans is None:
            spans = [RowSpan.whole(len(row)) for row in rows]
        queries = [
            row[span.start : span.start + span.queries]
            for row, span in zip(rows, spans, strict=True)
        ]
        return cls(to_device(torch.cat(queries), device), tuple(spans), store)

    @classmethod
    def dense(cls, input_ids: Tensor) -> ForwardBatch:
        """A batch of equally long rows, int64 [rows, length]; every hidden state is returned."""
        rows, length = input_ids.shape
        return cls(input_ids.reshape(-1), (RowSpan.whole(length),) * rows)

    @classmethod
    def of_tensors(cls, input_ids: Tensor, store: KeyValueStore, **derived: object) -> ForwardBatch:
        """A pass without spans: `derived` is what otherwise comes from them, by name."""
        batch = cls(input_ids, (), store)
        batch.__dict__.update(derived)
        return batch

    @cached_property
    def positions(self) -> Tensor:
        """int64 [tokens], each query token's position in its own canvas."""
        starts = [span.start for span in self.spans]
        return to_device(ranges(starts, self._queries), self.input_ids.device)

    @cached_property
    def output_tokens(self) -> Tensor | None:
        """int64 [outputs], indices into the query tokens; None when all of them are wanted."""
        if all(span.outputs == span.queries for span in self.spans):
            return None
        firsts = [
            begin + span.output_start - span.start
            for begin, span in zip(self._begins, self.spans, strict=True)
        ]
        outputs = [span.outputs for span in self.spans]
        return to_device(ranges(firsts, outputs), self.input_ids.device)

    @cached_property
    def cached_tokens(self) -> Tensor | None:
        """int64 [n], query tokens whose keys and values are kept; None when all of them are."""
        kept = [
            (begin, span.queries)
            for begin, span in zip(self._begins, self.spans, strict=True)
            if span.cache_offset is not None
        ]
        if len(kept) == len(self.spans):
            return None
        return _ranges_on(self.input_ids.device, kept)

    @cached_property
    def cache_places(self) -> Tensor | None:
        """int64 [n], where the keys and values of `cached_tokens` go; None when none is kept."""
        kept = [
            (span.cache_offset + span.start, span.queries)
            for span in self.spans
            if span.cache_offset is not None
        ]
        return _ranges_on(self.input_ids.device, kept) if kept else None

    @cached_property
    def packed(self) -> Callable[[int | None, bool], PackedRows | None]:
        """The rows as `attend_packed` takes them, by the size of blocks that see none after them
        (None without any), and whether only the wanted hidden states are computed. None when it
        cannot take them."""

        @cache
        def packed(block: int | None, wanted: bool) -> PackedRows | None:
            return pack_rows(
                [span.parts(block, wanted=wanted) for span in self.spans],
                self._queries,
                [span.keys for span in self.spans],
                [span.cache_offset for span in self.spans],
                self.input_ids.device,
            )

        return packed

    @cached_property
    def seen_keys(self) -> Callable[[int | None, bool], SeenKeys]:
        """What the queries see, by the arguments of `packed`."""

        @cache
        def seen_keys(block: int | None, wanted: bool) -> SeenKeys:
            numbers, query = [], 0
            for begin, span in zip(self._begins, self.spans, strict=True):
                is_cached = self.store is not None and span.cache_offset is not None
                place = span.cache_offset if is_cached else begin
                for queries, keys in span.parts(block, wanted=wanted):
                    numbers.append((query, queries, int(is_cached), place, keys))
                    query += queries
            return SeenKeys(torch.from_numpy(np.array(numbers)), len(self.spans), block)

        return seen_keys

    @property
    def _queries(self) -> list[int]:
        return [span.queries for span in self.spans]

    @property
    def _begins(self) -> list[int]:
        """Where each row's tokens begin among the query tokens."""
        return list(accumulate(self._queries, initial=0))[:-1]

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """Attention calls when every query token is computed."""
        return _group([(span.queries, span) for span in self.spans])

    @cached_property
    def output_groups(self) -> list[AttentionGroup]:
        """Attention calls when only the wanted hidden states are computed."""
        return _group([(span.outputs, span) for span in self.spans])


def ranges(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The numbers start, start + 1 .. start + count - 1 of every range, one range after the other:
    int64 [sum of counts]."""
    count, total = np.array(counts, dtype=np.int64), sum(counts)
    shift = np.array(starts, dtype=np.int64) - (count.cumsum() - count)
    return torch.from_numpy(np.arange(total) + shift.repeat(count))


def _ranges_on(device: torch.device, kept: Sequence[tuple[int, int]]) -> Tensor:
    return to_device(ranges([start for start, _ in kept], [count for _, count in kept]), device)


def _group(rows: Sequence[tuple[int, RowSpan]]) -> list[AttentionGroup]:
    """Merge neighbouring rows of equal shape."""

    def shape(row: tuple[int, RowSpan]) -> tuple[int, int, int]:
        queries, span = row
        return span.queries, queries, span.keys

    groups = []
    for (tokens, queries, keys), members in groupby(rows, shape):
        spans = [span for _, span in members]
        offsets = None
        if tokens < keys:
            offsets = tuple(span.cache_offset for span in spans if span.cache_offset is not None)
        groups.append(AttentionGroup(len(spans), tokens, queries, keys, offsets))
    return groups
