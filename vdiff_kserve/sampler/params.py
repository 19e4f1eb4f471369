"""How one request is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Remasking = Literal["low_confidence", "random"]
CacheMode = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class DecodingParams:
    """The parameters of one request's denoising; every row of a batch has its own.

    Attributes:
        steps: denoising steps for the whole answer, shared out over its blocks; None commits one
            token per step. Not used when `threshold` is set.
        block_length: tokens decoded together; blocks are finished left to right.
        temperature: 0 takes the most likely token; above it, samples from softmax(logits / T).
        top_p: sample only from the smallest set of tokens whose probability reaches this.
        remasking: which masked positions a scheduled step keeps masked: those of least confidence,
            or random ones.
        threshold: when set, a step commits every masked position of the block whose confidence
            reaches it, and never fewer than one (Fast-dLLM, arXiv 2505.22618).
        cfg_scale: strength of classifier-free guidance; 0 is off, above it costs twice the compute.
        logits_eos_inf: never write the end-of-text token.
        confidence_eos_eot_inf: leave end tokens for last.
        seed: of the row's random numbers.
        cache: what a bidirectional model remembers between the steps of a block (Fast-dLLM's caches,
            approximate): nothing, the keys and values left of the block, or also those right of it.
        refresh_interval: recompute the whole canvas every so many steps inside a block; None only
            when a block begins.
        vicinity: positions on either side of the block that a cached step recomputes too.
        max_lookahead: most masked positions right of the active block that the model sees; None is
            the whole canvas, as the published loops have it.
    """

    steps: int | None = None
    block_length: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    seed: int = 0
    cache: CacheMode = "none"
    refresh_interval: int | None = None
    vicinity: int = 0
    max_lookahead: int | None = None
