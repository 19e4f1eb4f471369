"""Forward passes of models that transformers runs: in one piece, or a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vdiff_kserve.models.batch import ForwardBatch, RowSpan

CHUNKS = 8
"""Parts in which a pass over a long text can run, so that it leaves room for other rows."""


@dataclass
class WholePass:
    """A forward pass with a single stage."""

    model: Callable[[ForwardBatch], Tensor]
    batch: ForwardBatch
    layers_left: int = 1
    _outputs: Tensor | None = None

    def advance(self, layers: int) -> None:
        """Run it, unless `layers` is 0."""
        if layers and self.layers_left:
            self._outputs = self.model(self.batch)
            self.layers_left = 0

    @property
    def outputs(self) -> Tensor:
        """[outputs, vocab]"""
        assert self._outputs is not None, "the pass is not complete"
        return self._outputs


class ChunkedPass:
    """A causal model's pass over one row, a chunk of its tokens after the other: each leaves its
    keys and values for the next. A row without a cache runs in one piece, with the last chunk.

    Attributes:
        layers_left: chunks still to run.
    """

    def __init__(self, model: Callable[[ForwardBatch], Tensor], batch: ForwardBatch) -> None:
        (self._span,) = batch.spans
        self._model, self._batch = model, batch
        self._outputs: Tensor | None = None
        self.layers_left = CHUNKS

    def advance(self, layers: int) -> None:
        """Run the next `layers` chunks, or as many as are left."""
        for _ in range(min(layers, self.layers_left)):
            # Counted when it has run: a chunk that fails may be tried again.
            if self._span.cache_offset is not None:
                self._run(CHUNKS - self.layers_left)
            elif self.layers_left == 1:
                self._outputs = self._model(self._batch)
            self.layers_left -= 1

    def _run(self, number: int) -> None:
        whole, is_last = self._span, number == CHUNKS - 1
        first_wanted = whole.output_start - whole.start
        ends = [first_wanted * (i + 1) // CHUNKS for i in range(CHUNKS - 1)] + [whole.queries]
        begin, end = ends[number - 1] if number else 0, ends[number]
        if begin == end:
            return
        start, keys = whole.start + begin, whole.start + end
        wanted = (whole.output_start, whole.outputs) if is_last else (keys - 1, 1)
        span = RowSpan(start, end - begin, keys, *wanted, whole.cache_offset)
        ids = self._batch.input_ids[begin:end]
        outputs = self._model(ForwardBatch(ids, (span,), self._batch.store))
        if is_last:
            self._outputs = outputs

    @property
    def outputs(self) -> Tensor:
        """[outputs, ...]"""
        assert self._outputs is not None, "the pass is not complete"
        return self._outputs
