"""A pass in chunks: all of the text in order, also when a chunk fails and is tried again."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor

from vdiff_kserve.models import ForwardBatch, RowSpan
from vdiff_kserve.models.batch import KeyValueStore
from vdiff_kserve.models.chunked_pass import CHUNKS, ChunkedPass

STORE = KeyValueStore(torch.zeros(1, 64, 1, 2), torch.zeros(1, 64, 1, 2))


class Reader:
    """Reads a chunk after the other, each from where the one before ended; a few fail once."""

    def __init__(self, *failing: int) -> None:
        self.read: list[int] = []
        self._failing = list(failing)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        (span,) = batch.spans
        assert span.start == len(self.read) + 3, "tokens were left out"
        if span.start in self._failing:
            self._failing.remove(span.start)
            raise torch.OutOfMemoryError("once")
        self.read += batch.input_ids.tolist()
        return torch.tensor(self.read)[span.output_start - 3 :][: span.outputs]


def chunked(reader: Reader, offset: int | None = 0) -> ChunkedPass:
    span = RowSpan(3, 41, 44, 40, 4, offset)
    return ChunkedPass(reader, ForwardBatch(torch.arange(41), (span,), STORE))


def advance(part: ChunkedPass, layers: int) -> None:
    """What fails is tried again, as the engine does with fewer rows."""
    with suppress(torch.OutOfMemoryError):
        part.advance(layers)


@pytest.mark.parametrize("offset", [0, None])
@pytest.mark.parametrize("failing", [(), (3,), (12, 21), (35,)])
def test_every_token_is_read_once_and_in_order(
    failing: tuple[int, ...], offset: int | None
) -> None:
    reader = Reader(*failing)
    part = chunked(reader, offset)
    while part.layers_left:
        advance(part, 3)
    assert reader.read == list(range(41))
    assert part.outputs.tolist() == [37, 38, 39, 40]


def test_chunks_are_counted_as_they_run() -> None:
    part = chunked(Reader())
    part.advance(3)
    assert part.layers_left == CHUNKS - 3
    part.advance(CHUNKS)
    assert part.layers_left == 0
