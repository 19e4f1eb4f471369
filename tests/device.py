"""Where tests compute."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff_kserve.models import ForwardBatch, KeyValueStore, RowSpan

TEST_DEVICE = torch.empty(0, device=os.environ.get("VDIFF_TEST_DEVICE", "cpu")).device
"""With its index, as a model's weights have it."""


def pack(
    rows: Sequence[Tensor],
    spans: Sequence[RowSpan] | None = None,
    store: KeyValueStore | None = None,
) -> ForwardBatch:
    """A batch on `TEST_DEVICE` of canvases that are on the host."""
    return ForwardBatch.pack(rows, spans, store, TEST_DEVICE)
