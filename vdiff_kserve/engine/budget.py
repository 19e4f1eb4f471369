"""How many tokens a round may spend on passes over whole canvases."""

from __future__ import annotations

import time

import torch

from vdiff_kserve.models import ForwardBatch, LanguageModel

REFRESH_SECONDS = 0.25
"""How much longer than a round of cached passes a round may take for the sake of whole ones."""

LEAST, MOST = 256, 16384
SAMPLE_TOKENS = 256
TRIES = 4
"""The fastest counts: the first ones also warm up."""


@torch.inference_mode()
def measured_token_budget(decoder: LanguageModel, longest: int) -> int:
    """Tokens whose forward pass takes about `REFRESH_SECONDS` on this machine: a power of two.

    Args:
        longest: the model's context; the sample is not longer.
    """
    tokens = min(SAMPLE_TOKENS, longest)
    batch = ForwardBatch.dense(torch.zeros(1, tokens, dtype=torch.long, device=decoder.device))
    fastest = min(_seconds(decoder, batch) for _ in range(TRIES))
    affordable = max(1, int(tokens * REFRESH_SECONDS / fastest))
    return max(LEAST, min(MOST, 1 << (affordable.bit_length() - 1)))


def _seconds(decoder: LanguageModel, batch: ForwardBatch) -> float:
    started = time.perf_counter()
    decoder(batch)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter() - started
