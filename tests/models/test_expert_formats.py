"""Published formats with experts: SDAR-MoE and LLaDA-MoE against transformers' Qwen3-MoE."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.device import TEST_DEVICE
from tests.golden import GOLDEN_DIR
from tests.models.folders import random_tensors, write_config, write_shards
from tests.models.test_causal_formats import IDS, SIZES, logits_of, save
from tests.models.test_loader import MEASURE
from vdiff_kserve.models import CheckpointError, Hints, load_decoder

EXPERTS: dict[str, Any] = dict(
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    mlp_only_layers=[],
    decoder_sparse_step=1,
    rope_theta=1e4,
)


def save_dense_model(folder: Path) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """A random Qwen3, and the fields of its `config.json` as published checkpoints have them."""
    config = Qwen3Config(**SIZES, head_dim=16)
    model = save(Qwen3ForCausalLM, config, folder)
    fields = config.to_dict() | {"mask_token_id": 63, "rope_theta": 1e4}
    fields.pop("rope_parameters", None)
    return model, fields


def save_model(folder: Path, **changes: Any) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """The same of Qwen3-MoE."""
    config = Qwen3MoeConfig(**SIZES, **EXPERTS | changes)
    model = save(Qwen3MoeForCausalLM, config, folder)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in load_file(
        folder / "model.safetensors"
    ), "transformers no longer writes the published names"
    fields = config.to_dict() | {"mask_token_id": 63, "rope_theta": 1e4, "num_experts": 8}
    fields.pop("rope_parameters", None)
    return model, fields


@pytest.mark.parametrize("renormalized", [True, False])
@pytest.mark.parametrize("dense_layers", [[], [0]])
@torch.inference_mode()
def test_sdar_moe_is_qwen3_moe_with_a_block_causal_mask(
    tmp_path: Path, dense_layers: list[int], renormalized: bool
) -> None:
    changes = {"mlp_only_layers": dense_layers, "norm_topk_prob": renormalized}
    model, fields = save_model(tmp_path, **changes)
    write_config(tmp_path, fields | {"architectures": ["SDARMoeForCausalLM"], "block_size": 4})
    decoder, spec = load_decoder(tmp_path, TEST_DEVICE)
    assert spec.family == "sdar_moe"
    assert spec.block_length == 4
    blocks = torch.arange(11) // 4
    hidden = (blocks[:, None] < blocks).float() * torch.finfo(torch.float32).min
    expected = model(IDS, attention_mask=hidden.expand(3, 1, 11, 11)).logits
    torch.testing.assert_close(logits_of(decoder), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_llada_moe_with_a_dense_layer_and_grouped_heads_is_qwen3_moe_that_sees_everything(
    tmp_path: Path,
) -> None:
    model, fields = save_model(tmp_path, mlp_only_layers=[0], norm_topk_prob=False)
    fields |= {
        "architectures": ["LLaDAMoEModelLM"],
        "expert_intermediate_size": fields.pop("moe_intermediate_size"),
        "dense_intermediate_size": fields.pop("intermediate_size"),
        "moe_layer_freq": [0, 1],
        "qk_layernorm": True,
        "norm_topk_prob": True,
    }
    write_config(tmp_path, fields)
    decoder, spec = load_decoder(tmp_path, TEST_DEVICE)
    assert not spec.block_causal
    expected = model(IDS, attention_mask=torch.zeros(3, 1, 11, 11)).logits
    torch.testing.assert_close(logits_of(decoder), expected, atol=1e-4, rtol=1e-4)


def copy_of_golden(folder: Path, family: str) -> dict[str, torch.Tensor]:
    (folder / "config.json").write_bytes((GOLDEN_DIR / family / "config.json").read_bytes())
    return load_file(GOLDEN_DIR / family / "model.safetensors")


def test_a_missing_and_a_misshaped_expert_are_named(tmp_path: Path) -> None:
    tensors = copy_of_golden(tmp_path, "llada2")
    missing = "model.layers.1.mlp.experts.3.up_proj.weight"
    misshaped = "model.layers.2.attention.query_key_value.weight"
    del tensors[missing]
    tensors[misshaped] = tensors[misshaped][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_decoder(tmp_path)
    assert f"1 missing: {missing}" in str(caught.value)
    assert f"{misshaped} is [127, 64], config.json says [128, 64]" in str(caught.value)


def test_routers_stay_float32_in_a_bfloat16_model() -> None:
    decoder, _ = load_decoder(GOLDEN_DIR / "llada2", dtype=torch.bfloat16)
    router = decoder.layers[1].mlp.router
    stored = load_file(GOLDEN_DIR / "llada2" / "model.safetensors")
    assert torch.equal(router.bias, stored["model.layers.1.mlp.gate.expert_bias"])
    assert torch.equal(router.weight, stored["model.layers.1.mlp.gate.weight"])
    assert decoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "field", "value", "said"),
    [
        ("llada_moe", "num_experts_per_tok", 9, "choose of 8 only"),
        ("llada_moe", "moe_layer_freq", 1, "list of integers"),
        ("llada_moe", "partial_rotary_factor", 1.5, "from 0 to 1"),
        ("llada_moe", "partial_rotary_factor", 0.2, "rotates 3 of 16"),
        ("llada_moe", "clip_qkv", 8.0, "not supported"),
        ("llada_moe", "moe_router_enable_expert_bias", True, "only False"),
        ("llada_moe", "expert_intermediate_size", None, "missing"),
        ("llada2", "score_function", "softmax", "only 'sigmoid'"),
        ("llada2", "num_experts_per_tok", 5, "choose of 4 only"),
        ("llada2", "norm_topk_prob", False, "only True"),
        ("llada2", "num_shared_experts", "1", "0 or a positive integer"),
        ("llada2", "first_k_dense_replace", None, "missing"),
        ("llada2", "n_group", 3, "does not divide 8"),
        ("llada2", "num_key_value_heads", 3, "does not divide 4"),
    ],
)
def test_experts_that_are_not_implemented_are_refused(
    tmp_path: Path, family: str, field: str, value: Any, said: str
) -> None:
    tensors = copy_of_golden(tmp_path, family)
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    write_config(tmp_path, fields | {field: value})
    with pytest.raises(CheckpointError, match=said) as caught:
        load_decoder(tmp_path)
    assert f"`{field}`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("inclusionAI/LLaDA2.1-mini", "edit"),
        ("llada2.1-flash", "edit"),
        ("LLaDA2.0-mini", "dynamic"),
    ],
)
def test_only_llada2_1_edits_by_default(name: str, policy: str) -> None:
    _, spec = load_decoder(GOLDEN_DIR / "llada2", hints=Hints(name=name))
    assert spec.profiles["quality"]["policy"] == policy


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_with_experts_is_the_model_and_one_shard(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Experts are gathered from their own tensors and packed a layer at a time."""
    config = {
        "architectures": ["SDARMoeForCausalLM"],
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
        "mask_token_id": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    }
    small = config | {"hidden_size": 64, "num_experts": 4, "num_hidden_layers": 1}
    for name, fields, shards in (("small", small, 1), ("large", config, 8)):
        tensors = random_tensors(fields)
        write_shards(tmp_path / name, fields, tensors, shards)
    model = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    assert model > 200e6
    del tensors
    shard = max(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    folders = [str(tmp_path / "small"), str(tmp_path / "large")]
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders, str(dtype).split(".")[1]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    peak, afterwards = map(int, child.stdout.split())
    slack = 25e6
    assert peak < model + shard + slack
    assert afterwards < model + slack
