"""A random model too small to say anything, and an engine around it that records what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.device import TEST_DEVICE, pack
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.engine.request import EventSink
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.models import Decoder, DecoderConfig, ForwardBatch, ModelSpec
from vdiff_kserve.sampler import DecodingParams

VOCAB, MASK, EOS, EOT = 40, 39, 38, 37
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_in_float32=True,
    tie_embeddings=False,
)


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Random weights that look at the whole canvas and are sure of some positions only."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(replace(CONFIG, **changes))
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = 1.0 if "embed" in name or "lm_head" in name else 2.0 / parameter.shape[1] ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return decoder.requires_grad_(False).eval().to(TEST_DEVICE)


def tiny_auxiliary(seed: int = 1) -> Decoder:
    """A causal model with the same vocabulary."""
    return tiny_decoder(seed, num_layers=1, attention_block=1)


@torch.inference_mode()
def logits_of(decoder: Decoder, canvas: Tensor, *, shifted: bool = False) -> Tensor:
    """Of a whole canvas, each position's own: [length, vocab], on the host."""
    logits = decoder.logits(decoder(pack([canvas]))).cpu()
    return torch.cat([logits[:1], logits[:-1]]) if shifted else logits


def tiny_spec(decoder: Decoder, shifted: bool = False) -> ModelSpec:
    return ModelSpec("tiny", decoder.config, MASK, EOS, EOT, 96, 8, shifted_logits=shifted)


@dataclass(frozen=True)
class Step:
    """One `Row.apply`: the canvas before and after it, and the active block before it."""

    before: Tensor
    masked_before: Tensor
    after: Tensor
    masked_after: Tensor
    block: tuple[int, int]
    decision: Decision


@dataclass(eq=False)
class Watched:
    """A row and the steps it made."""

    row: Row
    steps: list[Step] = field(default_factory=list)


class WatchingEngine(Engine):
    """An engine that keeps every row and every step it made in `watched`."""

    watched: list[Watched]

    def make_row(self, request: GenerationRequest, sink: EventSink) -> Row:
        row = super().make_row(request, sink)
        watched = Watched(row)
        self.__dict__.setdefault("watched", []).append(watched)
        apply = row.apply

        def recording_apply(decision: Decision) -> None:
            before, masked = row.canvas.clone(), row.masked.clone()
            block = (row.block_start, row.block_end)
            apply(decision)
            after = Step(before, masked, row.canvas.clone(), row.masked.clone(), block, decision)
            watched.steps.append(after)

        row.apply = recording_apply  # type: ignore[method-assign]
        return row


@contextmanager
def running(
    decoder: Decoder,
    config: EngineConfig | None = None,
    *,
    auxiliary: Decoder | None = None,
    shifted: bool = False,
    spec: ModelSpec | None = None,
) -> Iterator[WatchingEngine]:
    """A started engine, stopped when the block is left."""
    spec = spec or tiny_spec(decoder, shifted)
    engine = WatchingEngine(decoder, spec, config or EngineConfig(), auxiliary)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def generate(
    decoder: Decoder,
    *requests: GenerationRequest,
    auxiliary: Decoder | None = None,
    shifted: bool = False,
    max_num_seqs: int = 8,
) -> list[GenerationResult]:
    """The requests' results, all submitted at once."""
    config = EngineConfig(max_num_seqs=max_num_seqs)
    with running(decoder, config, auxiliary=auxiliary, shifted=shifted) as engine:
        return engine.generate(requests)


def request_of(
    prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 16, **decoding: Any
) -> GenerationRequest:
    """A request with blocks of 8 unless told otherwise, which fills its whole canvas."""
    decoding = {"block_length": 8} | decoding
    return GenerationRequest(prompt, max_tokens, DecodingParams(**decoding))


class GatedDecoder(Decoder):
    """A decoder whose forward passes wait for `allow`, and that counts them."""

    @classmethod
    def around(cls, decoder: Decoder) -> GatedDecoder:
        from threading import Semaphore

        gated = cls(decoder.config)
        gated.load_state_dict(decoder.state_dict())
        gated.requires_grad_(False).eval().to(decoder.device)
        gated.gate = Semaphore(0)
        gated.passes = 0
        gated.waiting = 0
        return gated

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.waiting += 1
        self.gate.acquire()
        self.waiting -= 1
        self.passes += 1
        return super().forward(batch)

    def allow(self, passes: int) -> None:
        self.gate.release(passes)
