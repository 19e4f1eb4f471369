"""CUDA graphs of cached passes: the same kernels again without launching each from the host.

A cached pass runs a few hundred small kernels over one block of each row; on a fast GPU the host
cannot launch them as fast as they end. All rows of such a pass have one shape, so it is captured
once per shape and number of rows (rounded up), over tensors that stay where they are, and replayed
with other contents. What cannot be captured runs as it does without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.models.attention import PackedRows, VarlenCall, has_kernel, sequences_of
from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan, ranges
from vdiff_kserve.models.decoder import Decoder
from vdiff_kserve.models.moe import has_expert_kernel

MAX_GRAPHS = 48
"""Captured passes that are kept; a further one takes the place of the one not used for longest."""
PAUSE = 256
"""Passes that run without a graph, for want of one, before capturing is tried again where there was
no memory for it."""
LONGEST = 256
"""Most queries of a row whose pass is captured. Longer passes keep a GPU busy by themselves, and
come in too many lengths: with the cache `prefix`, every block of every request has its own."""

Pass = Callable[[], Tensor]
Recorder = Callable[[Pass], tuple[Tensor, Callable[[], None]]]

logger = logging.getLogger("kserve.vdiff.engine")


@dataclass(frozen=True)
class ReuseShape:
    """What rows of one captured pass have in common.

    Attributes:
        queries: tokens computed of each row.
        first_output: which of them is the first whose hidden state is wanted.
        outputs: how many are wanted.
    """

    queries: int
    first_output: int
    outputs: int

    @classmethod
    def of(cls, span: RowSpan) -> ReuseShape | None:
        """The shape of a row's pass; None when it is not a short cached one."""
        if span.cache_offset is None or span.queries == span.keys or span.queries > LONGEST:
            return None
        return cls(span.queries, span.output_start - span.start, span.outputs)


def bucket_of(rows: int) -> int:
    """The number of rows that a captured pass for `rows` has: 1, 2, 4, 8, then multiples of 8."""
    if rows > 8:
        return -(-rows // 8) * 8
    return 1 << (rows - 1).bit_length()


class CapturedReuse:
    """A pass over at most `bucket` rows of one shape, in memory that stays in its place.

    Places that no row takes are computed as well; their keys and values go to the cache's last
    place, which belongs to no row.

    Args:
        longest: bound of the keys of a row.
        record: captures a pass; returns its output and what runs it again.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KeyValueStore,
        shape: ReuseShape,
        bucket: int,
        longest: int,
        record: Recorder,
    ) -> None:
        self._shape = shape
        self._bucket = bucket
        self._spare_place = store.keys.shape[1] - 1
        device = decoder.device
        pinned = device.type == "cuda"
        tokens, outputs = bucket * shape.queries, bucket * shape.outputs
        self._sizes = (tokens, tokens, tokens, outputs)
        self._staged = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=pinned)
        bounds = 3, 2 * bucket + 1
        self._staged_bounds = torch.zeros(bounds, dtype=torch.int32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        self._inputs = torch.zeros_like(self._staged, device=device)
        self._bounds = torch.zeros_like(self._staged_bounds, device=device)
        self._fill([], [])
        batch = self._batch(store, longest)
        self._output, self._replay = record(lambda: decoder(batch))

    def run(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> Tensor:
        """Hidden states of the wanted positions, rows end to end: [rows * outputs, hidden_size].
        The next run overwrites them.

        Args:
            spans: of this pass's shape, with ascending places in the cache.
        """
        self._fill(canvases, spans)
        self._replay()
        return self._output[: len(spans) * self._shape.outputs]

    def _fill(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> None:
        """Bring the rows to the device, in two copies that wait for nothing."""
        if self._copied is not None:
            self._copied.synchronize()
        self._stage_tokens(canvases, spans)
        self._stage_bounds(spans)
        self._inputs.copy_(self._staged, non_blocking=True)
        self._bounds.copy_(self._staged_bounds, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _stage_tokens(self, canvases: Sequence[Tensor], spans: Sequence[RowSpan]) -> None:
        shape, count = self._shape, len(spans)
        ids, positions, places, wanted = self._staged.split(self._sizes)
        self._staged.zero_()
        places.fill_(self._spare_place)
        if not spans:
            return
        starts = [span.start for span in spans]
        firsts = [span.start + (span.cache_offset or 0) for span in spans]
        begins = [row * shape.queries + shape.first_output for row in range(count)]
        tokens, lengths = count * shape.queries, [shape.queries] * count
        blocks = [
            canvas[start : start + shape.queries]
            for canvas, start in zip(canvases, starts, strict=True)
        ]
        ids[:tokens] = torch.cat(blocks)
        positions[:tokens] = ranges(starts, lengths)
        places[:tokens] = ranges(firsts, lengths)
        wanted[: count * shape.outputs] = ranges(begins, [shape.outputs] * count)

    def _stage_bounds(self, spans: Sequence[RowSpan]) -> None:
        """Sequences of queries, of wanted queries and of keys; places without a row have none."""
        offsets = [span.cache_offset or 0 for span in spans]
        keys = [span.keys for span in spans]
        size = self._staged_bounds.shape[1]
        staged = []
        for queries in (self._shape.queries, self._shape.outputs):
            cu_queries, cu_keys = sequences_of([queries] * len(spans), offsets, keys)
            staged.append(cu_queries + cu_queries[-1:] * (size - len(cu_queries)))
        staged.append(cu_keys + cu_keys[-1:] * (size - len(cu_keys)))
        self._staged_bounds.copy_(torch.tensor(staged, dtype=torch.int32))

    def _batch(self, store: KeyValueStore, longest: int) -> ForwardBatch:
        """The pass over the tensors that `_fill` fills."""
        shape = self._shape
        ids, positions, places, wanted = self._inputs.split(self._sizes)
        cu_queries, cu_outputs, cu_keys = self._bounds
        rows, outputs = (
            PackedRows(None, VarlenCall(cu, cu_keys, max(2, most), longest), 0, 0, ())
            for cu, most in ((cu_queries, shape.queries), (cu_outputs, shape.outputs))
        )
        return ForwardBatch.of_tensors(
            ids,
            store,
            positions=positions,
            output_tokens=None if shape.outputs == shape.queries else wanted,
            cache_places=places,
            cached_tokens=None,
            packed=rows,
            packed_outputs=outputs,
        )


class CudaRecorder:
    """Captures passes as CUDA graphs, all on one stream and in one pool of memory: only one of them
    runs at a time, and libraries keep a workspace for every stream that they have seen."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> tuple[Tensor, Callable[[], None]]:
        """Capture `run`, after running it once so that its libraries are set up."""
        stream, outside = self._stream, torch.cuda.current_stream(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(outside)
        try:
            with torch.cuda.stream(stream):
                run()
            outside.wait_stream(stream)
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                output = run()
        finally:
            torch.cuda.set_stream(outside)  # where a capture that fails does not return
        return output, graph.replay


class ReuseGraphs:
    """The captured passes of a model, made when first needed.

    Attributes:
        failed: whether a pass could not be captured, and not for want of memory; then none is any
            more.

    Args:
        longest: most tokens of a canvas.
        record: captures a pass; returns its output and what runs it again.
    """

    def __init__(self, decoder: Decoder, longest: int, record: Recorder) -> None:
        self._decoder = decoder
        self._longest = longest
        self._record = record
        self._captured: dict[tuple[ReuseShape, int], CapturedReuse] = {}
        self._pause = 0
        self.failed = False

    @classmethod
    def for_model(cls, decoder: object, longest: int) -> ReuseGraphs | None:
        """Those of a model whose passes can be captured; None when they cannot: graphs need a GPU
        and kernels that ask the host for nothing, for attention and for experts."""
        if not isinstance(decoder, Decoder):
            return None
        config, device = decoder.config, decoder.device
        if not has_kernel(device, decoder.dtype, config.head_dim):
            return None
        if config.moe is not None and not has_expert_kernel(device, decoder.dtype):
            return None
        return cls(decoder, longest, CudaRecorder(device))

    def choose(self, spans: Sequence[RowSpan]) -> list[int]:
        """Which rows of a pass to run captured: those of the most frequent shape, in the order of
        their places in the cache. Block-causal rows whose queries are of two blocks need a mask and
        are not among them."""
        if self.failed:
            return []
        by_shape: dict[ReuseShape, list[int]] = {}
        block = self._decoder.config.attention_block
        for i, span in enumerate(spans):
            shape = ReuseShape.of(span)
            if shape is not None and (
                block is None or span.start // block == (span.keys - 1) // block
            ):
                by_shape.setdefault(shape, []).append(i)
        if not by_shape:
            return []
        chosen = max(by_shape.values(), key=len)
        return sorted(chosen, key=lambda i: spans[i].cache_offset or 0)

    def run(
        self, canvases: Sequence[Tensor], spans: Sequence[RowSpan], store: KeyValueStore
    ) -> Tensor | None:
        """Hidden states of rows that `choose` chose; None when they must run without a graph."""
        shape = ReuseShape.of(spans[0])
        assert shape is not None, "only cached passes are captured"
        if self.failed:
            return None
        key = shape, bucket_of(len(spans))
        captured = self._captured.pop(key, None) or self._try_to_capture(store, *key)
        if captured is None:
            return None
        self._captured[key] = captured  # behind those used before
        return captured.run(canvases, spans)

    def _try_to_capture(
        self, store: KeyValueStore, shape: ReuseShape, bucket: int
    ) -> CapturedReuse | None:
        """A new captured pass; None where that failed, or did so lately."""
        if self._pause:
            self._pause -= 1
            return None
        try:
            return self._capture(store, shape, bucket)
        except Exception as error:  # noqa: BLE001 - whatever the capture raised
            if _lacks_memory(error):
                self._pause = PAUSE
                logger.warning("No memory to capture a pass of %d rows: %s", bucket, error)
            else:
                self.failed = True
                self._captured.clear()
                logger.warning("No CUDA graphs, since a pass cannot be captured: %s", error)
        return None

    def _capture(self, store: KeyValueStore, shape: ReuseShape, bucket: int) -> CapturedReuse:
        if len(self._captured) >= MAX_GRAPHS:
            del self._captured[next(iter(self._captured))]
        return CapturedReuse(self._decoder, store, shape, bucket, self._longest, self._record)


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether memory was wanting, also where another error came of it: a capture broken off
    raises one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
