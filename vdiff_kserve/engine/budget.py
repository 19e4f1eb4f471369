"""How many tokens a round may spend on passes over whole canvases."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from vdiff_kserve.models import ForwardBatch, LanguageModel, get_kernels_ready, keep_freed_memory

REFRESH_SECONDS = 0.25
"""How much longer than a round of cached passes a round may take for the sake of whole ones."""

LONG_PASS_SHARE = 0.6
"""Of the time, what the sample's rate is counted on: a long pass costs more for each of its tokens,
since attention's part grows with the length."""

LEAST, MOST = 256, 16384
STEP = 64
SAMPLE_TOKENS = {"cpu": 256, "cuda": 2048}
"""Fewer would measure how fast a GPU reads weights and the host launches kernels."""
TRIES = 4
"""The fastest counts: the first ones also warm up."""
ENOUGH_SECONDS = 1.0
"""Trying ends after so long."""


@torch.inference_mode()
def measured_token_budget(decoder: LanguageModel, longest: int) -> int:
    """Tokens for which a long pass takes about `REFRESH_SECONDS` on this machine: a multiple of 64.

    Args:
        longest: the model's context; the sample is not longer.
    """
    if decoder.device.type == "cpu":
        keep_freed_memory()
        get_kernels_ready(decoder)
    on_gpu = decoder.device.type == "cuda"
    tokens = min(SAMPLE_TOKENS[decoder.device.type], longest)
    batch = ForwardBatch.dense(torch.zeros(1, tokens, dtype=torch.long, device=decoder.device))
    tried: list[float] = []
    with torch.cuda.device(decoder.device) if on_gpu else nullcontext():
        if on_gpu:
            _seconds(decoder, batch)  # loads libraries and compiles kernels, for seconds
        while len(tried) < TRIES and sum(tried) < ENOUGH_SECONDS:
            tried.append(_seconds(decoder, batch))
    affordable = int(tokens * LONG_PASS_SHARE * REFRESH_SECONDS / min(tried))
    return max(LEAST, min(MOST, affordable // STEP * STEP))


def _seconds(decoder: LanguageModel, batch: ForwardBatch) -> float:
    started = time.perf_counter()
    decoder(batch)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter() - started
