"""Fast-dLLM v2's rows against its published loop, without a cache, over transformers' Qwen2."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.engine.tiny import MASK, request_of, running, tiny_decoder, tiny_spec
from tests.golden import GOLDEN_DIR
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import load_decoder
from vdiff_kserve.sampler import DREAM_POLICIES, DecodingParams
from vdiff_kserve.sampler.noise import gumbel, seed_of_draw

FOLDER = GOLDEN_DIR / "fast_dllm_v2"
BLOCK, SUB_BLOCK = 16, 4
PROMPT_LENGTHS = (1, 9, 15, 16, 17, 32, 38)


@cache
def stock_qwen2() -> Qwen2ForCausalLM:
    fields = json.loads((FOLDER / "config.json").read_text())
    known = {name: fields[name] for name in Qwen2Config().to_dict() if name in fields}
    known["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    model = Qwen2ForCausalLM(Qwen2Config(**known)).eval()
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model


@torch.no_grad()
def logits_of(canvas: list[int]) -> Tensor:
    """Of a whole canvas whose blocks see themselves and all to their left: [tokens, vocab]."""
    blocks = torch.arange(len(canvas)) // BLOCK
    hidden = torch.finfo(torch.float32).min
    mask = torch.where(blocks[:, None] >= blocks, 0.0, hidden)
    model = stock_qwen2()
    return model(torch.tensor([canvas]), attention_mask=mask[None, None]).logits[0].float()


def published_loop(
    prompt: list[int],
    max_tokens: int,
    threshold: float,
    temperature: float,
    top_p: float,
    seed: int,
) -> tuple[list[int], int]:
    """The answer, cut to `max_tokens`, and its steps; candidates come from the engine's noise."""
    mask_id, canvas, steps = 316, list(prompt), 0
    while len(canvas) < len(prompt) + max_tokens:
        if len(canvas) % BLOCK == 0:
            first = logits_of(canvas)[-1]
            first[mask_id] = -torch.inf
            canvas.append(int(first.argmax()))
            steps += 1
        canvas += [mask_id] * (-len(canvas) % BLOCK)
        open_places = [i for i in range(len(canvas)) if canvas[i] == mask_id and i >= len(prompt)]
        for start in range(len(canvas) - BLOCK, len(canvas), SUB_BLOCK):
            while places := [i for i in open_places if start <= i < start + SUB_BLOCK]:
                if places[0] >= len(prompt) + max_tokens:
                    break
                logits = logits_of(canvas)[[i - 1 for i in places]]
                if temperature == 0:
                    probability = logits.softmax(dim=-1)
                    tokens = probability.argmax(dim=-1)
                else:
                    logits[:, mask_id] = -torch.inf  # a mask is never drawn
                    probability = nucleus((logits / temperature).softmax(dim=-1), top_p)
                    seeds = torch.full((len(places),), seed_of_draw(seed, steps))
                    noise = gumbel(seeds, torch.tensor(places), logits.shape[-1])
                    tokens = (probability.double().log() + noise).argmax(dim=-1)
                steps += 1
                sure = probability.gather(1, tokens[:, None])[:, 0]
                accepted = sure > threshold
                accepted[sure.argmax()] = True
                for place, token, yes in zip(places, tokens.tolist(), accepted, strict=True):
                    if yes:
                        canvas[place] = token
                        open_places.remove(place)
    return canvas[len(prompt) : len(prompt) + max_tokens], steps


def nucleus(probability: Tensor, top_p: float) -> Tensor:
    ranked, order = probability.sort(dim=-1, descending=True)
    ranked[ranked.cumsum(dim=-1) - ranked > top_p] = 0
    kept = torch.zeros_like(probability).scatter(1, order, ranked)
    return kept / kept.sum(dim=-1, keepdim=True)


def engine_with(max_num_seqs: int) -> Engine:
    decoder, spec = load_decoder(FOLDER)
    return Engine(decoder, spec, EngineConfig(max_num_seqs=max_num_seqs))


def prompt_of(length: int) -> list[int]:
    return torch.randint(
        0, 300, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()


@pytest.mark.parametrize("cache_mode", ["none", "exact"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.8, 0.9)])
def test_batch_equals_the_published_loop_of_each_prompt(
    cache_mode: Any, temperature: float, top_p: float
) -> None:
    """Also of a prompt that is one whole block, which the published code forgets."""
    decoding = DecodingParams(
        policy="threshold",
        threshold=0.6,
        strict_threshold=True,
        filtered_confidence=True,
        temperature=temperature,
        top_p=top_p,
        block_length=SUB_BLOCK,
        cache=cache_mode,
        seed=7,
    )
    engine = engine_with(max_num_seqs=len(PROMPT_LENGTHS) - 2)
    engine.start()
    lengths = [20 + 3 * i for i in range(len(PROMPT_LENGTHS))]
    prompts = [prompt_of(length) for length in PROMPT_LENGTHS]
    results = engine.generate(
        [
            GenerationRequest(tuple(prompt), length, decoding)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
    )
    engine.stop()
    for prompt, length, result in zip(prompts, lengths, results, strict=True):
        expected, steps = published_loop(prompt, length, 0.6, temperature, top_p, seed=7)
        assert list(result.token_ids) == expected
        assert result.stats.nfe == steps


def test_first_token_of_a_block_is_the_likeliest_whatever_the_temperature() -> None:
    """As published; the others are drawn."""
    prompt = tuple(prompt_of(BLOCK))
    decoding = DecodingParams(policy="threshold", block_length=SUB_BLOCK, temperature=2.0)
    engine = engine_with(max_num_seqs=4)
    engine.start()
    results = engine.generate(
        [GenerationRequest(prompt, BLOCK, replace(decoding, seed=seed)) for seed in range(4)]
    )
    engine.stop()
    assert len({result.token_ids[0] for result in results}) == 1
    assert len({result.token_ids for result in results}) == 4


@pytest.mark.parametrize("cache_mode", ["exact", "dual"])
def test_an_answer_does_not_depend_on_the_batch(cache_mode: Any) -> None:
    decoding = DecodingParams(
        policy="threshold", threshold=0.4, block_length=SUB_BLOCK, cache=cache_mode
    )
    requests = [
        GenerationRequest(tuple(prompt_of(length)), 30, decoding) for length in PROMPT_LENGTHS
    ]
    engine = engine_with(max_num_seqs=8)
    engine.start()
    together = engine.generate(requests)
    alone = [engine_result for request in requests for engine_result in engine.generate([request])]
    engine.stop()
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    decoding = DecodingParams(policy="threshold", block_length=SUB_BLOCK, cache="exact")
    first = GenerationRequest(tuple(prompt_of(32)), 40, decoding)
    engine = engine_with(max_num_seqs=1)
    engine.start()
    (answer,) = engine.generate([first])
    (again,) = engine.generate([first])
    turn = GenerationRequest((*first.prompt_ids, *answer.token_ids, 5, 6), 12, decoding)
    (second,) = engine.generate([turn])
    engine.stop()
    assert again.token_ids == answer.token_ids
    assert again.stats.cached_tokens == 16, "the last block predicts the first token"
    assert second.stats.cached_tokens == 64
    fresh = engine_with(max_num_seqs=1)
    fresh.start()
    (plain,) = fresh.generate([turn])
    fresh.stop()
    assert second.token_ids == plain.token_ids


TINY = tiny_decoder(attention_block=8)
TINY_SPEC = replace(tiny_spec(TINY, shifted=True), sub_blocks=True)


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 36), min_size=1, max_size=20),
    max_tokens=st.integers(1, 30),
    policy=st.sampled_from(
        [*sorted(DREAM_POLICIES), "low_confidence", "random", "threshold", "factor", "credit"]
    ),
    block_length=st.sampled_from([1, 2, 4, 8]),
    cache_mode=st.sampled_from(["none", "exact", "dual"]),
    steps=st.none() | st.integers(1, 40),
    vicinity=st.integers(0, 3),
    interval=st.none() | st.integers(1, 3),
    cfg_scale=st.sampled_from([0.0, 1.5]),
)
def test_every_step_writes_masks_of_its_block_from_computed_states(
    prompt: list[int],
    max_tokens: int,
    policy: Any,
    block_length: int,
    cache_mode: Any,
    steps: int | None,
    vicinity: int,
    interval: int | None,
    cfg_scale: float,
) -> None:
    request = request_of(
        tuple(prompt),
        max_tokens,
        policy=policy,
        block_length=block_length,
        cache=cache_mode,
        steps=steps,
        cfg_scale=cfg_scale,
        **({"vicinity": vicinity, "refresh_interval": interval} if cache_mode == "dual" else {}),
    )
    with running(TINY, spec=TINY_SPEC) as engine:
        (result,) = engine.generate([request])
    assert len(result.token_ids) == max_tokens
    assert MASK not in result.token_ids
    (watched,) = engine.watched
    assert result.stats.nfe == len(watched.steps)
    for step in watched.steps:
        span, positions = step.decision.span, step.decision.positions
        assert len(positions) > 0
        assert step.masked_before[positions].all()
        assert span.start <= span.output_start
        assert span.output_start + span.outputs <= span.start + span.queries <= span.keys
        assert all(step.block[0] <= p < step.block[1] for p in positions.tolist())
        first_of_block = step.block[0] % 8 == 0 and bool(step.masked_before[step.block[0]])
        assert first_of_block == (span.keys == step.block[0])
