"""CUDA graphs of short passes: the same kernels again without launching each from the host.

A pass runs a few hundred small kernels; on a fast GPU the host cannot launch them as fast as they
end, unless a pass is long. All rows of a cached pass have one shape, so it is captured once per
shape and number of rows (rounded up); a short pass over the whole canvas of one row is captured by
its length (rounded up). What is captured is over tensors that stay where they are, and is replayed
with other contents. What cannot be captured runs as it does without graphs.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vdiff_kserve.models import split_attention
from vdiff_kserve.models.attention import has_kernel
from vdiff_kserve.models.batch import KeyValueStore, RowSpan
from vdiff_kserve.models.captured_pass import CapturedPass, Pass, PassShape, Recorder
from vdiff_kserve.models.decoder import Decoder
from vdiff_kserve.models.moe import has_expert_kernel

MAX_GRAPHS = 64
"""Captured passes that are kept; a further one takes the place of the one not used for longest."""
PAUSE = 256
"""Passes that run without a graph, for want of one, before capturing is tried again where there was
no memory for it."""
LONGEST = 256
"""Most queries of a row whose cached pass is captured. Longer passes keep a GPU busy by themselves,
and come in too many lengths: with the cache `prefix`, every block of every request has its own."""
MOST_ROWS = 128
"""Of a captured pass; more keep a GPU busy by themselves."""
LONGEST_WHOLE = 512
"""Most tokens of a canvas whose whole pass is captured."""
WHOLE_STEP = 32
"""What its lengths are rounded up to."""

logger = logging.getLogger("kserve.vdiff.engine")


def shape_of_reuse(span: RowSpan, block: int | None = None) -> PassShape | None:
    """Of a row's pass; None when it is not a short cached one.

    Args:
        block: so many tokens count as one also where the row has no more.
    """
    if span.cache_offset is None or span.queries == span.keys != block or span.queries > LONGEST:
        return None
    return PassShape(1, span.queries, span.outputs, span.outputs == span.queries, is_cached=True)


def shape_of_whole(span: RowSpan) -> PassShape | None:
    """Of a row's pass; None when it is not a short one over a whole canvas."""
    if span.queries < span.keys or span.queries > LONGEST_WHOLE:
        return None
    queries, outputs = (
        -(-each // WHOLE_STEP) * WHOLE_STEP for each in (span.queries, span.outputs)
    )
    return PassShape(1, queries, outputs, span.outputs == span.queries, is_cached=False)


def bucket_of(rows: int) -> int:
    """The number of rows that a captured pass for `rows` has: 1, 2, 4, 8, then multiples of 8, and
    beyond 64 of 16."""
    if rows > 8:
        step = 8 if rows <= 64 else 16
        return -(-rows // step) * step
    return 1 << (rows - 1).bit_length()


class CudaRecorder:
    """Captures passes as CUDA graphs, all on one stream and in one pool of memory, since only one
    of them runs at a time.

    torch gives a pool up with the last graph in it, and takes it for no further one; so one that
    does nothing stays.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Pass) -> tuple[Tensor, Callable[[], None]]:
        """Capture `run`, after running it once so that its libraries are set up."""
        stream, outside = self._stream, torch.cuda.current_stream(self._stream.device)
        try:
            if self._anchor is None:
                nothing = torch.zeros(1, device=stream.device)
                self._pool = torch.cuda.graph_pool_handle()
                self._anchor = self._capture(nothing.zero_)[1]
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                run()
            outside.wait_stream(stream)
            output, graph = self._capture(run)
        finally:
            torch.cuda.set_stream(outside)  # where a capture that fails does not return
        return output, graph.replay

    def _capture(self, run: Pass) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        with (
            _with_own_workspaces(),
            _without_collecting_garbage(),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            output = run()
        return output, graph


@contextmanager
def _with_own_workspaces() -> Iterator[None]:
    """Let a capture take cuBLAS's workspace from its pool, as torch's compiler does. The one that
    torch keeps for a stream is freed with any graph captured there, while others still use it."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """A graph that is found among it, of a model that was unloaded, would break a capture off."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
        self._captured: dict[PassShape, CapturedPass] = {}
        self._seen: set[PassShape] = set()
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
        if config.moe is not None and not (
            has_expert_kernel(device, decoder.dtype) and config.moe.is_aligned(config.hidden_size)
        ):
            return None
        return cls(decoder, longest, CudaRecorder(device))

    @cached_property
    def takes_blocks(self) -> int | None:
        """The size of blocks of which several of one row may be rows of a captured pass; None when
        they may not. A block sees all to its left, so that they share keys."""
        config, decoder = self._decoder.config, self._decoder
        block, group = config.attention_block, config.num_heads // config.num_kv_heads
        if block is None or block == 1:
            return None
        heads = decoder.device, decoder.dtype, config.head_dim, group
        return block if split_attention.takes(block, *heads) else None

    def sizes(self, most: int) -> list[int]:
        """Numbers of rows that bring up every captured pass that at most so many rows need."""
        most = min(most, MOST_ROWS)
        return sorted({min(bucket_of(rows), most) for rows in range(1, most + 1)})

    def choose(self, spans: Sequence[RowSpan]) -> list[int]:
        """Which rows of a pass to run captured: those of the most frequent shape, in the order of
        their places in the cache. Rows whose queries are of several blocks are not among them."""
        if self.failed:
            return []
        by_shape: dict[PassShape, list[int]] = {}
        for i, span in enumerate(spans):
            shape = shape_of_reuse(span, self.takes_blocks)
            if shape is not None and self._needs_no_mask(span):
                by_shape.setdefault(shape, []).append(i)
        if not by_shape:
            return []
        chosen = max(by_shape.values(), key=len)
        if len(chosen) > MOST_ROWS:
            return []
        return sorted(chosen, key=lambda i: spans[i].cache_offset or 0)

    def run(
        self, canvases: Sequence[Tensor], spans: Sequence[RowSpan], store: KeyValueStore
    ) -> Tensor | None:
        """Hidden states of rows that `choose` chose; None when they must run without a graph."""
        shape = shape_of_reuse(spans[0], self.takes_blocks)
        assert shape is not None, "only cached passes are captured"
        return self._run(replace(shape, rows=bucket_of(len(spans))), canvases, spans, store)

    def run_whole(self, canvas: Tensor, span: RowSpan, store: KeyValueStore) -> Tensor | None:
        """Hidden states of a row by itself; None when it must run without a graph. A length is
        captured when it comes again: the canvases of one request are equally long."""
        shape = shape_of_whole(span)
        if shape is None or not self._needs_no_mask(span):
            return None
        if shape not in self._seen:
            self._seen.add(shape)
            return None
        return self._run(shape, [canvas], [span], store)

    def _needs_no_mask(self, span: RowSpan) -> bool:
        """Whether all of a row's queries see all of its keys."""
        block = self._decoder.config.attention_block
        return block is None or span.start // block == (span.keys - 1) // block

    def _run(
        self,
        shape: PassShape,
        canvases: Sequence[Tensor],
        spans: Sequence[RowSpan],
        store: KeyValueStore,
    ) -> Tensor | None:
        if self.failed:
            return None
        captured = self._captured.pop(shape, None) or self._try_to_capture(store, shape)
        if captured is None:
            return None
        self._captured[shape] = captured  # behind those used before
        return captured.run(canvases, spans)

    def _try_to_capture(self, store: KeyValueStore, shape: PassShape) -> CapturedPass | None:
        """A new captured pass; None where that failed, or did so lately."""
        if self._pause:
            self._pause -= 1
            return None
        try:
            return self._capture(store, shape)
        except Exception as error:  # noqa: BLE001 - whatever the capture raised
            if _lacks_memory(error):
                self._pause = PAUSE
                logger.warning("No memory to capture a pass of %d rows: %s", shape.rows, error)
            else:
                self.failed = True
                self._captured.clear()
                logger.warning("No CUDA graphs, since a pass cannot be captured: %s", error)
        return None

    def _capture(self, store: KeyValueStore, shape: PassShape) -> CapturedPass:
        if len(self._captured) >= MAX_GRAPHS:
            del self._captured[next(iter(self._captured))]
        longest = self._longest if shape.is_cached else shape.queries
        return CapturedPass(self._decoder, store, shape, longest, self._record)


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether memory was wanting, torch's or the driver's, also where another error came of it: a
    capture broken off raises one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
