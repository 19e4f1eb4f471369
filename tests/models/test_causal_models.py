"""Causal checkpoints of the hub, served token by token, against transformers' `generate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.device import TEST_DEVICE, pack
from tests.golden import GOLDEN_DIR
from tests.models.causal_folders import MODELS, write_causal
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.models import (
    CheckpointError,
    Decoder,
    ForwardBatch,
    causal_attention,
    load_causal_model,
)
from vdiff_kserve.models.causal import is_causal
from vdiff_kserve.models.transformers_model import CachedTransformersModel, TransformersModel
from vdiff_kserve.sampler import DecodingParams

NATIVE = {"llama", "qwen2", "qwen3"}
UNCACHED = {"bloom", "mamba"}
ALWAYS_TESTED = {"llama3", "qwen2", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "mamba"}
"""A native layout, rotary scaling, windows, soft caps, sinks, latent attention, and no cache."""
NEW_TOKENS = 20
PROMPTS = [
    torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 1, 23, 17)
]


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return written[0, len(prompt) :].tolist()


def generate(
    folder: Path, prompts: list[list[int]], cache: str | None = None
) -> list[GenerationResult]:
    model, spec = load_causal_model(folder, TEST_DEVICE)
    engine = Engine(model, spec, EngineConfig(max_num_seqs=3))
    engine.start()
    decoding = dict(spec.profiles["quality"]) | ({} if cache is None else {"cache": cache})
    requests = [
        GenerationRequest(tuple(prompt), NEW_TOKENS, DecodingParams(**decoding))
        for prompt in prompts
    ]
    results = engine.generate(requests)
    engine.stop()
    return results


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS_TESTED else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_greedy_answers_equal_generate(name: str, tmp_path: Path) -> None:
    """More prompts than slots, so that rows of all ages share a pass."""
    reference = write_causal(name, tmp_path)
    assert is_causal(tmp_path)
    model, spec = load_causal_model(tmp_path, TEST_DEVICE)
    expected_class = Decoder if name in NATIVE else CachedTransformersModel
    assert type(model) is (TransformersModel if name in UNCACHED else expected_class)
    assert spec.cacheable == (name not in UNCACHED)
    results = generate(tmp_path, PROMPTS)
    expected = [greedy(reference, prompt) for prompt in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 15, "nothing to compare"
    assert [list(result.token_ids) for result in results] == expected
    for result in results:
        assert result.stats.nfe == NEW_TOKENS
        assert result.stats.refreshes == (NEW_TOKENS if name in UNCACHED else 1)


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_answers_without_the_cache_are_the_same(name: str, tmp_path: Path) -> None:
    write_causal(name, tmp_path)
    cached, plain = (generate(tmp_path, PROMPTS, cache) for cache in ("exact", "none"))
    assert [each.token_ids for each in cached] == [each.token_ids for each in plain]


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_a_prompt_seen_before_is_copied(name: str, tmp_path: Path) -> None:
    reference = write_causal(name, tmp_path)
    model, spec = load_causal_model(tmp_path, TEST_DEVICE)
    engine = Engine(model, spec, EngineConfig(max_num_seqs=2))
    engine.start()
    decoding = DecodingParams(**spec.profiles["quality"])
    (first,) = engine.generate([GenerationRequest(tuple(PROMPTS[2]), NEW_TOKENS, decoding)])
    turn = [*PROMPTS[2], *first.token_ids, 7]
    (second,) = engine.generate([GenerationRequest(tuple(turn), NEW_TOKENS, decoding)])
    engine.stop()
    assert second.stats.cached_tokens == 32
    assert list(second.token_ids) == greedy(reference, turn)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "bloom"])
def test_a_long_prompt_is_computed_in_parts_beside_other_rows(name: str, tmp_path: Path) -> None:
    reference = write_causal(name, tmp_path)
    model, spec = load_causal_model(tmp_path, TEST_DEVICE)
    long = torch.randint(3, 300, (100,), generator=torch.Generator().manual_seed(9)).tolist()
    prompts = [PROMPTS[0], long, [*long, 5], PROMPTS[1]]
    rounds: list[int] = []
    config = EngineConfig(
        max_num_batched_tokens=24, observer=lambda report: rounds.append(report.rows)
    )
    engine = Engine(model, spec, config)
    engine.start()
    decoding = DecodingParams(**spec.profiles["quality"])
    results = engine.generate(
        [GenerationRequest(tuple(prompt), NEW_TOKENS, decoding) for prompt in prompts]
    )
    engine.stop()
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == greedy(reference, prompt)
    if spec.cacheable:
        assert rounds.index(4) > 4, "the long prompts were computed in one round"


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(tmp_path: Path) -> None:
    write_causal("mistral", tmp_path)
    model, spec = load_causal_model(tmp_path, TEST_DEVICE)
    engine = Engine(model, spec, EngineConfig(max_num_seqs=4))
    engine.start()
    requests = [
        GenerationRequest(
            tuple(PROMPTS[0]),
            NEW_TOKENS,
            DecodingParams(**spec.profiles["quality"], temperature=1.0, seed=seed),
        )
        for seed in range(4)
    ]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    engine.stop()
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert len({each.token_ids for each in together}) == 4


@torch.inference_mode()
def test_a_pass_tells_the_logits_of_every_token_that_is_asked_for(tmp_path: Path) -> None:
    """What the chain rule needs: each prompt token's probability, in one pass."""
    reference = write_causal("gemma2", tmp_path)
    reference.set_attn_implementation("eager")  # older versions cap the scores here only
    model, _ = load_causal_model(tmp_path, TEST_DEVICE)
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    logits = model.logits(model(pack(rows))).cpu().split([len(row) for row in rows])
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found, reference(row[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    write_causal("qwen2", tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert load_causal_model(tmp_path)[1].end_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 9]}))
    assert load_causal_model(tmp_path)[1].end_token_ids == (5, 2, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 999]}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load_causal_model(tmp_path)


def test_a_model_that_cannot_be_cached_is_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_causal("mamba", tmp_path)
    with caplog.at_level(logging.WARNING, "kserve.vdiff.model"):
        load_causal_model(tmp_path)
    assert "without a cache" in caplog.text


def test_a_cache_that_loses_something_is_found_out_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = write_causal("mistral", tmp_path)
    monkeypatch.setattr(causal_attention, "_keep", lambda *_: None)
    with caplog.at_level(logging.WARNING, "kserve.vdiff.model"):
        (result,) = generate(tmp_path, PROMPTS[:1])
    assert "keeps more than keys and values" in caplog.text
    assert list(result.token_ids) == greedy(reference, PROMPTS[0])
    assert result.stats.refreshes == NEW_TOKENS


def test_only_the_native_decoder_is_quantized(tmp_path: Path) -> None:
    (tmp_path / "qwen2").mkdir()
    (tmp_path / "mistral").mkdir()
    write_causal("qwen2", tmp_path / "qwen2")
    write_causal("mistral", tmp_path / "mistral")
    model, _ = load_causal_model(tmp_path / "qwen2", quantization="int8")
    exact, _ = load_causal_model(tmp_path / "qwen2")
    batch = ForwardBatch.pack([torch.tensor(PROMPTS[2])])
    with torch.inference_mode():
        difference = (model.logits(model(batch)) - exact.logits(exact(batch))).abs().max()
    assert 0 < difference < 2
    with pytest.raises(CheckpointError, match="--quantization is not for"):
        load_causal_model(tmp_path / "mistral", quantization="int8")


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    write_causal("mistral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        load_causal_model(tmp_path)


def test_extras_of_published_checkpoints_are_left_out(tmp_path: Path) -> None:
    """Frequencies that older versions stored, and layers that predict further tokens."""
    expected = write_causal("deepseek_v3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    further = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    assert further
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "mtp.layers.0.eh_proj.weight": torch.ones(2, 2),
    }
    save_file(tensors | extras | further, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unexpected_keys: \['model.layers.2"):
        load_causal_model(tmp_path)
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (result,) = generate(tmp_path, PROMPTS[:1])
    assert list(result.token_ids) == greedy(expected, PROMPTS[0])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "says 1000000000 layers, the files have 2 at most"),
        ("num_hidden_layers", -1, "layers"),
        ("num_hidden_layers", 1, r"unexpected_keys: \['model.layers.1"),
        ("hidden_size", 10**6, "says 1000000, and no tensor has a side of that"),
        ("intermediate_size", 10**6, "says 1000000, the longest side of a tensor is 320"),
        ("intermediate_size", 90, r"mismatched_keys: .*mlp.down_proj"),
        ("max_position_embeddings", 10**12, "no size of a model"),
        ("num_attention_heads", 0, "mismatched_keys: .*q_proj"),
        ("rms_norm_eps", 1e300, "logits are NaN or 0"),
        ("hidden_act", "sine", "transformers cannot load it"),
    ],
)
def test_a_field_that_the_files_contradict_is_refused_before_memory_is_taken(
    tmp_path: Path, field: str, value: object, said: str
) -> None:
    write_causal("mistral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=said):
        load_causal_model(tmp_path)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    write_causal("mistral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_causal_model(tmp_path)


def test_diffusion_checkpoints_are_not_causal() -> None:
    assert not is_causal(GOLDEN_DIR / "dream")
    assert not is_causal(GOLDEN_DIR / "llada")
