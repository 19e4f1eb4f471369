"""DiffusionGemma: transformers' logits, and what its sampler writes from the same random tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from tests.device import TEST_DEVICE
from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.engine.renoising import RenoiseRow
from vdiff_kserve.engine.request import EventSink
from vdiff_kserve.engine.row import Row
from vdiff_kserve.models import (
    ForwardBatch,
    KeyValueStore,
    ModelSpec,
    Renoising,
    RowSpan,
)
from vdiff_kserve.models.diffusion_gemma import DiffusionGemma, load_diffusion_gemma
from vdiff_kserve.sampler import DecodingParams, random_tokens, seed_of_draw
from vdiff_kserve.sampler.noise import gumbel

FAMILY = "diffusion_gemma"
MOE = {"atol": 2e-3, "rtol": 1e-3}


@cache
def loaded() -> tuple[DiffusionGemma, ModelSpec]:
    return load_diffusion_gemma(GOLDEN_DIR / FAMILY, TEST_DEVICE)


def canvas_logits(
    prompts: list[Tensor], canvases: Tensor, conditioning: Tensor | None = None
) -> Tensor:
    """Of canvases behind prompts of any lengths, in one batch: [rows, canvas, vocab]."""
    gemma, _ = loaded()
    rows = [torch.cat(pair) for pair in zip(prompts, canvases, strict=True)]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    offsets = [0, *ends[:-1]]
    config = gemma.config
    shape = (config.num_layers, ends[-1], config.num_kv_heads, config.head_dim)
    store = KeyValueStore(*(torch.zeros(shape, device=TEST_DEVICE) for _ in "kv"))
    read, written = [], []
    for prompt, row, offset in zip(prompts, rows, offsets, strict=True):
        length, whole = len(prompt), len(row)
        read.append(RowSpan(0, length, length, 0, length, offset))
        written.append(RowSpan(length, whole - length, whole, length, whole - length, offset))
    gemma(ForwardBatch.pack(rows, read, store, TEST_DEVICE))
    soft = (
        None if conditioning is None else gemma.soften(conditioning.flatten(0, 1).to(TEST_DEVICE))
    )
    hidden = gemma.denoise(ForwardBatch.pack(rows, written, store, TEST_DEVICE), soft)
    return gemma.logits(hidden).unflatten(0, canvases.shape).cpu()


@pytest.mark.parametrize("case", golden_cases(FAMILY, "logits"), ids=lambda case: case.name)
@torch.inference_mode()
def test_golden_diffusion_gemma_logits(case: GoldenCase) -> None:
    prompts = list(case.tensor("input_ids"))
    if case.has("attention_mask"):
        masks = case.tensor("attention_mask").bool()
        prompts = [row[mask] for row, mask in zip(prompts, masks, strict=True)]
    canvases = case.tensor("decoder_input_ids")
    logits = canvas_logits(prompts, canvases)
    torch.testing.assert_close(logits, case.tensor("logits"), **MOE)
    if case.has("self_conditioning_logits"):
        conditioned = canvas_logits(prompts, canvases, case.tensor("self_conditioning_logits"))
        expected = case.tensor("logits_with_self_conditioning")
        torch.testing.assert_close(conditioned, expected, **MOE)


class ReplayRow(RenoiseRow):
    """A row that takes the recorded random tokens. `skipped` are those that the reference drew for
    rows of its batch that were not done while this one was: they come before a canvas's first."""

    recorded: Tensor  # [draws, canvas]
    skipped: list[int]

    def draw_canvas(self, number: int) -> Tensor:
        canvas = (self.block_start - self.prompt_length) // self._canvas_tokens
        return self.recorded[number + sum(self.skipped[:canvas])]


def run(case: GoldenCase, max_tokens: int, skipped: list[list[int]]) -> list[GenerationResult]:
    params = case.params
    gemma, spec = loaded()
    assert spec.block_length == params["canvas_length"]
    spec = replace(
        spec,
        renoising=Renoising(
            params["max_denoising_steps"],
            params["t_min"],
            params["t_max"],
            params["stability_threshold"],
            params["confidence_threshold"],
        ),
    )

    class ReplayEngine(Engine):
        def make_row(self, request: GenerationRequest, sink: EventSink) -> Row:
            index = int(request.request_id)

            class OwnRow(ReplayRow):
                recorded = case.tensor("random_canvases")[:, index]

            OwnRow.skipped = skipped[index]
            return OwnRow(request, sink, self.spec)

    engine = ReplayEngine(gemma, spec, EngineConfig(max_num_seqs=4))
    engine.start()
    decoding = DecodingParams(
        policy="entropy_bound",
        entropy_bound=params["sampler_config"],
        block_length=spec.block_length,
        cache="exact",
    )
    results = engine.generate(
        [
            GenerationRequest(
                tuple(prompt), max_tokens, decoding, spec.end_token_ids, request_id=str(i)
            )
            for i, prompt in enumerate(case.prompts())
        ]
    )
    engine.stop()
    return results


@pytest.mark.parametrize("case", golden_cases(FAMILY, "generate"), ids=lambda case: case.name)
def test_golden_diffusion_gemma_generate(case: GoldenCase) -> None:
    """Rows of the reference's batch wait for each other after each canvas, and random tokens are
    drawn for all meanwhile; here none waits, so that it skips what was drawn for others."""
    canvas, total = case.params["canvas_length"], case.params["max_new_tokens"]
    rows = len(case.prompts())
    skipped: list[list[int]] = [[] for _ in range(rows)]
    before, lockstep = [0] * rows, 0
    for end in range(canvas, total + 1, canvas):
        results = run(case, end, skipped)
        steps = [result.stats.nfe - done for result, done in zip(results, before, strict=True)]
        before = [result.stats.nfe for result in results]
        lockstep += max(steps)
        for row in range(rows):
            skipped[row].append(max(steps) - steps[row])
    assert lockstep == case.nfe
    encoder = max(result.stats.encoder for result in results)
    assert encoder == case.fields["nfe_encoder"]
    end_token = loaded()[1].eos_token_id
    per_forward = case.tensor("tokens_per_forward").tolist()
    for result, expected, rate in zip(results, case.answers(), per_forward, strict=True):
        answer = list(result.token_ids)
        if result.finish_reason == "stop":
            expected = expected[: expected.index(end_token)]
        assert answer == expected
        count = len(answer) + (result.finish_reason == "stop")
        assert count / result.stats.nfe == pytest.approx(rate)


class EnginesNumbers:
    """Gives transformers' sampler the random numbers that the engine takes for a seed."""

    def __init__(self, seed: int, first: int, canvas: int, vocab_size: int) -> None:
        self.seed, self.canvas, self.vocab_size = seed, canvas, vocab_size
        self.positions = torch.arange(first - canvas, first)
        self.drawn = 0
        self.renoises = False

    def initialize_canvas(self) -> Tensor:
        if not self.renoises:
            self.positions = self.positions + self.canvas
        tokens = random_tokens(self.seed, self.positions, self.drawn, self.vocab_size)
        self.drawn += 1
        return tokens[None]

    def multinomial(self, probabilities: Tensor, **_: Any) -> Tensor:
        seeds = torch.full_like(self.positions, seed_of_draw(self.seed, self.drawn - 1))
        noise = gumbel(seeds, self.positions, self.vocab_size)
        return (probabilities.double().log() + noise).argmax(dim=-1, keepdim=True)


@pytest.mark.parametrize("seed", [5, 6])
def test_drawn_answers_equal_those_of_transformers(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `generate`, at the published temperatures, given the engine's random numbers."""
    gemma, spec = loaded()
    prompt, canvas = list(range(30, 43)), spec.block_length
    settings = Renoising(max_steps=9, confidence_threshold=1.2)
    spec = replace(spec, renoising=settings)
    decoding = DecodingParams(
        **dict(spec.profiles["quality"]) | {"entropy_bound": 1.0, "block_length": canvas}, seed=seed
    )
    assert decoding.temperature == 1
    engine = Engine(gemma, spec, EngineConfig())
    engine.start()
    (result,) = engine.generate([GenerationRequest(tuple(prompt), 2 * canvas, decoding)])
    engine.stop()

    numbers = EnginesNumbers(seed, len(prompt), canvas, spec.decoder.vocab_size)
    renoise_canvas = EntropyBoundSampler.renoise_canvas

    def renoise(sampler: EntropyBoundSampler, *arguments: Any) -> Tensor:
        numbers.renoises = True
        tokens = renoise_canvas(sampler, *arguments)
        numbers.renoises = False
        return tokens

    monkeypatch.setattr(
        EntropyBoundSampler, "initialize_canvas", lambda *_, **__: numbers.initialize_canvas()
    )
    monkeypatch.setattr(EntropyBoundSampler, "renoise_canvas", renoise)
    monkeypatch.setattr(torch, "multinomial", numbers.multinomial)
    stock = DiffusionGemmaForBlockDiffusion.from_pretrained(GOLDEN_DIR / FAMILY).eval()
    written = stock.generate(
        torch.tensor([prompt]),
        max_new_tokens=2 * canvas,
        max_denoising_steps=settings.max_steps,
        confidence_threshold=settings.confidence_threshold,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=1.0),
    )
    assert list(result.token_ids) == written.sequences[0, len(prompt) :].tolist()
    assert 2 * canvas / result.stats.nfe == pytest.approx(float(written.tokens_per_forward[0]))
