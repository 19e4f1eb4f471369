"""Where tests compute."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff_kserve.models import ForwardBatch, KeyValueStore, RowSpan

TEST_DEVICE = torch.device(os.environ.get("VDIFF_TEST_DEVICE", "cpu"))


def pack(
    rows: Sequence[Tensor],
    spans: Sequence[RowSpan] | None = None,
    store: KeyValueStore | None = None,
) -> ForwardBatch:
    """A batch on `TEST_DEVICE` of canvases that are on the host."""
    return ForwardBatch.pack(rows, spans, store, TEST_DEVICE)
