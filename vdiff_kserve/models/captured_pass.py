"""Passes over memory that stays in its place, so that what was captured of one can run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vdiff_kserve.models.attention import PackedRows, VarlenCall, sequences_of
from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan
from vdiff_kserve.models.decoder import Decoder

Pass = Callable[[], Tensor]
Recorder = Callable[[Pass], tuple[Tensor, Callable[[], None]]]


@dataclass(frozen=True)
class PassShape:
    """What a captured pass has room for.

    Attributes:
        rows: how many.
        queries: tokens of a row that are computed.
        outputs: of a row that are wanted.
        wants_all: whether all tokens are wanted; else the last layer computes those that are.
        is_cached: whether rows see keys in the cache; else those of their own tokens.
    """

    rows: int
    queries: int
    outputs: int
    wants_all: bool
    is_cached: bool


class CapturedPass:
    """A pass over at most `shape.rows` rows.

    Places that no row takes are computed as well, as of sequences without keys, so that they are
    numbers; their keys and values go to the cache's last place, which belongs to no row.

    Args:
        longest: bound of the keys of a row.
        record: captures a pass; returns its output and what runs it again.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KeyValueStore,
        shape: PassShape,
        longest: int,
        record: Recorder,
    ) -> None:
        self._shape = shape
        self._spare_place = store.keys.shape[1] - 1
        device = decoder.device
        pinned = device.type == "cuda"
        tokens, outputs = shape.rows * shape.queries, shape.rows * shape.outputs
        self._num_bounds = 2 * (shape.rows + 1) + 1
        self._sizes = (tokens, tokens, tokens, outputs, -(-3 * self._num_bounds // 2))
        self._staged = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=pinned)
        self._host_parts = [part.numpy() for part in self._parts(self._staged)]
        self._copied = torch.cuda.Event() if pinned else None
        self._inputs = torch.zeros_like(self._staged, device=device)
        self._fill([], [])
        batch = self._batch(store, longest)
        # Not in the memory that captured passes share: another one may run before this is read.
        wanted = tokens if shape.wants_all else outputs
        states = torch.empty(
            (wanted, decoder.config.hidden_size), dtype=decoder.dtype, device=device
        )
        self._output, self._replay = record(lambda: states.copy_(decoder(batch)))

    def run(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> Tensor:
        """Hidden states of the wanted positions, rows end to end: [outputs, hidden_size]. The next
        run overwrites them.

        Args:
            spans: for which this pass has room: one, or several of its shape that see keys in the
                cache, with ascending places.
        """
        self._fill(canvases, spans)
        self._replay()
        return self._output[: sum(span.outputs for span in spans)]

    def _fill(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> None:
        """Bring the rows to the device, in one copy that waits for nothing."""
        if self._copied is not None:
            self._copied.synchronize()
        self._stage_tokens(canvases, spans)
        self._host_parts[-1][:] = self._bounds_of(spans)
        self._inputs.copy_(self._staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _parts(self, inputs: Tensor) -> list[Tensor]:
        """Of what the pass reads: its tokens, their positions, their places in the cache, which of
        them are wanted, and the bounds of sequences, int32 [3, bounds]."""
        *parts, bounds = inputs.split(self._sizes)
        used = bounds.view(torch.int32)[: 3 * self._num_bounds]
        return [*parts, used.view(3, self._num_bounds)]

    def _stage_tokens(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> None:
        ids, positions, places, wanted, _ = self._host_parts
        self._staged.zero_()
        places.fill(self._spare_place)
        if not spans:
            return
        length, outputs = spans[0].queries, spans[0].outputs  # of all
        starts = np.array([[span.start] for span in spans])
        own, tokens = starts + np.arange(length), len(spans) * length
        computed = [
            canvas.numpy()[span.start : span.start + length]
            for canvas, span in zip(canvases, spans, strict=True)
        ]
        np.concatenate(computed, out=ids[:tokens])
        positions[:tokens] = own.reshape(-1)
        if spans[0].cache_offset is not None:
            offsets = np.array([[span.cache_offset] for span in spans])
            places[:tokens] = (own + offsets).reshape(-1)
        firsts = np.array([[span.output_start] for span in spans]) - starts
        firsts += length * np.arange(len(spans))[:, None]
        wanted[: len(spans) * outputs] = (firsts + np.arange(outputs)).reshape(-1)

    def _bounds_of(self, spans: Sequence[RowSpan]) -> tuple[list[int], list[int], list[int]]:
        """Sequences of queries, of wanted queries and of keys; those of idle places come last."""
        keys = [span.keys for span in spans]
        starts = [span.cache_offset or 0 if self._shape.is_cached else 0 for span in spans]
        cu_keys = sequences_of(keys, starts, keys)[1]
        cu_queries = self._cut([span.queries for span in spans], self._shape.queries)
        cu_outputs = self._cut([span.outputs for span in spans], self._shape.outputs)
        cu_keys += cu_keys[-1:] * (len(cu_queries) - len(cu_keys))
        return cu_queries, cu_outputs, cu_keys

    def _cut(self, counts: list[int], most: int) -> list[int]:
        """Where sequences begin that are as long as the rows' counts, then as long as there are
        idle places for, `most` each."""
        rows, idle = self._shape.rows + 1, self._shape.rows * most - sum(counts)
        while len(counts) < rows:
            counts.append(min(most, idle))
            idle -= counts[-1]
        ends = accumulate(counts, initial=0)
        return [bound for end in ends for bound in (end, end)][:-1]

    def _batch(self, store: KeyValueStore, longest: int) -> ForwardBatch:
        """The pass over the tensors that `_fill` fills."""
        shape = self._shape
        ids, positions, places, wanted, bounds = self._parts(self._inputs)
        cu_queries, cu_outputs, cu_keys = bounds
        rows, outputs = (
            self._rows(VarlenCall(cu, cu_keys, max(2, most), longest), shape.rows * most)
            for cu, most in ((cu_queries, shape.queries), (cu_outputs, shape.outputs))
        )
        return ForwardBatch.of_tensors(
            ids,
            store,
            positions=positions,
            output_tokens=None if shape.wants_all else wanted,
            cache_places=places,
            cached_tokens=None,
            packed=lambda _, wanted: outputs if wanted else rows,
        )

    def _rows(self, call: VarlenCall, queries: int) -> PackedRows:
        if self._shape.is_cached:
            return PackedRows(None, call, 0, 0)
        return PackedRows(call, None, queries, self._shape.rows * self._shape.queries)
