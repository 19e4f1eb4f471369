"""Rows that are denoised from random tokens: seeds, batches, the cache, and how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import GOLDEN_DIR
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    GenerationEvent,
    GenerationRequest,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vdiff_kserve.engine.renoising import CanvasDecision
from vdiff_kserve.models import CheckpointError, ModelSpec
from vdiff_kserve.models.diffusion_gemma import DiffusionGemma, load_diffusion_gemma
from vdiff_kserve.sampler import Constraints, DecodingParams

CANVAS = 16
PROMPTS = [tuple(range(20, 20 + length)) for length in (5, 33, 18, 1)]


@cache
def loaded() -> tuple[DiffusionGemma, ModelSpec]:
    return load_diffusion_gemma(GOLDEN_DIR / "diffusion_gemma")


@pytest.fixture
def engine() -> Iterator[Engine]:
    gemma, spec = loaded()
    engine = Engine(gemma, spec, EngineConfig(max_num_seqs=3))
    engine.start()
    yield engine
    engine.stop()


def request_of(
    prompt: tuple[int, ...] = PROMPTS[0], max_tokens: int = 2 * CANVAS, **decoding: Any
) -> GenerationRequest:
    params = dict(loaded()[1].profiles["quality"]) | {"block_length": CANVAS, "steps": 12}
    return GenerationRequest(prompt, max_tokens, DecodingParams(**(params | decoding)))


def test_an_answer_depends_on_its_seed_and_not_on_the_batch(engine: Engine) -> None:
    requests = [request_of(prompt, seed=seed) for prompt in PROMPTS for seed in (1, 2)]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert len({each.token_ids for each in together}) == len(requests)


@pytest.mark.parametrize("max_tokens", [1, 16, 17, 40])
def test_canvases_are_whole_and_answers_are_cut(engine: Engine, max_tokens: int) -> None:
    (result,) = engine.generate([request_of(max_tokens=max_tokens)])
    canvases = -(-max_tokens // CANVAS)
    assert len(result.token_ids) == max_tokens
    assert result.stats.encoder == canvases
    assert canvases <= result.stats.nfe <= 12


def test_a_canvas_takes_no_more_than_its_share_of_the_steps(engine: Engine) -> None:
    (result,) = engine.generate([request_of(max_tokens=48, steps=9)])
    assert result.stats.nfe <= 9
    (least,) = engine.generate([request_of(max_tokens=48, steps=1)])
    assert least.stats.nfe == 3


def test_text_is_sent_a_canvas_at_a_time(engine: Engine) -> None:
    events: list[GenerationEvent] = []
    row = engine.make_row(request_of(max_tokens=40), events.append)
    assert engine._memory.reserve(row)
    while row.finish_reason is None:
        (decision,) = engine._runner.step([row])
        assert isinstance(decision, CanvasDecision)
        assert len(decision.positions) in (0, CANVAS)
        row.apply(decision)
    assert [len(event.token_ids) for event in events] == [16, 16, 8]
    assert [event.finish_reason for event in events] == [None, None, "length"]


def test_a_prompt_seen_before_is_not_encoded_again(engine: Engine) -> None:
    request = request_of(PROMPTS[1], max_tokens=CANVAS)
    (first,) = engine.generate([request])
    (again,) = engine.generate([request])
    assert again.token_ids == first.token_ids
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 32)
    whole = request_of(PROMPTS[1][:32], max_tokens=CANVAS)
    (without_encoder,) = engine.generate([whole])
    assert without_encoder.stats.encoder == 0
    gemma, spec = loaded()
    fresh = Engine(gemma, spec, EngineConfig(enable_prefix_caching=False))
    fresh.start()
    assert fresh.generate([whole])[0].token_ids == without_encoder.token_ids
    fresh.stop()


def test_a_long_prompt_is_encoded_in_parts_beside_other_rows() -> None:
    gemma, spec = loaded()
    requests = [request_of(tuple(range(20, 120))), *(request_of(prompt) for prompt in PROMPTS)]
    answers = []
    for budget in (24, 4096):
        engine = Engine(gemma, spec, EngineConfig(max_num_batched_tokens=budget))
        engine.start()
        answers.append([result.token_ids for result in engine.generate(requests)])
        engine.stop()
    assert answers[0] == answers[1]


def test_an_end_token_ends_the_answer_inside_a_canvas(engine: Engine) -> None:
    (whole,) = engine.generate([request_of()])
    end = whole.token_ids[5]
    (result,) = engine.generate([replace(request_of(), end_token_ids=(end,))])
    assert result.finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: whole.token_ids.index(end)]
    assert result.stats.encoder == 1


def test_bans_and_log_probabilities(engine: Engine) -> None:
    (plain,) = engine.generate([request_of()])
    banned = plain.token_ids[0]
    constraints = Constraints(logit_bias=((banned, -100.0),))
    (result,) = engine.generate([request_of(constraints=constraints)])
    assert banned not in result.token_ids
    events: list[GenerationEvent] = []
    row = engine.make_row(request_of(top_logprobs=2), events.append)
    assert engine._memory.reserve(row)
    while row.finish_reason is None:
        (decision,) = engine._runner.step([row])
        row.apply(decision)
    told = [score for event in events for score in event.logprobs]
    assert [score.token_id for score in told] == list(plain.token_ids)
    assert all(score.logprob <= 0 and len(score.top) == 2 for score in told)
    assert all(score.rank == 1 and score.top[0][0] == score.token_id for score in told)


def test_a_request_ends_with_its_deadline(engine: Engine) -> None:
    late = replace(request_of(max_tokens=1024, steps=None), deadline=0.0)
    with pytest.raises((QueueTimeoutError, RequestTimeoutError)):
        engine.generate([late])
    assert len(engine.generate([request_of()])[0].token_ids) == 2 * CANVAS


def test_a_model_that_transformers_runs_is_not_shared() -> None:
    mesh: Any = object()
    with pytest.raises(CheckpointError, match="--tensor_parallel_size is not for"):
        load_diffusion_gemma(GOLDEN_DIR / "diffusion_gemma", mesh=mesh)
    with pytest.raises(CheckpointError, match="--quantization is not for"):
        load_diffusion_gemma(GOLDEN_DIR / "diffusion_gemma", quantization="int8")


@torch.inference_mode()
def test_rows_keep_the_embeddings_of_a_step_and_not_its_logits(engine: Engine) -> None:
    row = engine.make_row(request_of(), lambda _: None)
    assert engine._memory.reserve(row)
    (decision,) = engine._runner.step([row])
    assert isinstance(decision, CanvasDecision)
    assert decision.soft.shape == (CANVAS, loaded()[0].config.hidden_size)


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("config.json", {"text_config": {"num_hidden_layers": 10**9}}, "says 1000000000 layers"),
        ("config.json", {"text_config": {"sliding_window": 0}}, "cannot be run"),
        ("config.json", {"text_config": {"max_position_embeddings": 1}}, "at least 2"),
        ("config.json", {"canvas_length": 0}, "`canvas_length`"),
        ("generation_config.json", {"max_denoising_steps": -5}, "`max_denoising_steps`"),
        ("generation_config.json", {"eos_token_id": []}, "`eos_token_id`"),
    ],
)
def test_fields_that_make_no_model_are_refused_by_name(
    tmp_path: Path, file: str, fields: dict[str, Any], said: str
) -> None:
    golden = GOLDEN_DIR / "diffusion_gemma"
    (tmp_path / "model.safetensors").symlink_to(golden / "model.safetensors")
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    if text := fields.get("text_config"):
        fields = {"text_config": config["text_config"] | text}
    changed = config | fields if file == "config.json" else fields
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        load_diffusion_gemma(tmp_path)
