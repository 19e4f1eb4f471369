"""Published formats in Qwen's layout against transformers' own implementations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.device import TEST_DEVICE
from tests.models.folders import write_config
from vdiff_kserve.models import (
    CheckpointError,
    Decoder,
    ForwardBatch,
    load_causal_decoder,
    load_decoder,
)

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(0))


def save(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path
) -> PreTrainedModel:
    """A random model, biases and norms included, written to `folder` as transformers writes it."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def logits_of(decoder: Decoder) -> Tensor:
    hidden = decoder(ForwardBatch.dense(IDS.to(decoder.device)))
    return decoder.logits(hidden).unflatten(0, IDS.shape).cpu()


@torch.inference_mode()
def check_equals(model: PreTrainedModel, decoder: Decoder) -> None:
    torch.testing.assert_close(logits_of(decoder), model(IDS).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
        (LlamaForCausalLM, LlamaConfig),
    ],
)
def test_causal_decoder_equals_transformers(
    tmp_path: Path,
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    tied: bool,
) -> None:
    sizes = SIZES | ({"head_dim": 16} if config_class is Qwen3Config else {})
    config = config_class(**sizes, tie_word_embeddings=tied)
    model = save(model_class, config, tmp_path)
    check_equals(model, load_causal_decoder(tmp_path, TEST_DEVICE))


def test_rotary_base_is_read_where_transformers_writes_it(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 77.0}
    model = save(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=parameters), tmp_path)
    decoder = load_causal_decoder(tmp_path)
    assert decoder.config.rope_theta == 77.0
    check_equals(model, decoder)


def test_scaled_rotary_positions_are_refused(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    save(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=scaled), tmp_path)
    with pytest.raises(CheckpointError, match="'linear' is not supported"):
        load_causal_decoder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu", "only 'silu'"),
        ("attention_bias", True, "only False"),
        ("num_key_value_heads", 3, "does not divide"),
        ("vocab_size", None, "missing"),
        ("rms_norm_eps", "a", "positive number"),
    ],
)
def test_causal_config_that_is_not_implemented_is_refused(
    tmp_path: Path, field: str, value: Any, said: str
) -> None:
    fields = LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"], field: value}
    write_config(tmp_path, fields)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_causal_decoder(tmp_path)
    assert f"`{field}`" in str(caught.value)


@torch.inference_mode()
def test_dream_is_qwen2_without_a_causal_mask(tmp_path: Path) -> None:
    """Stock Qwen2 weights, every position visible to every other."""
    torch.manual_seed(1)
    config = Qwen2Config(**SIZES, attn_implementation="sdpa")
    model = save(Qwen2ForCausalLM, config, tmp_path)
    fields = config.to_dict() | {
        "architectures": ["DreamModel"],
        "mask_token_id": 63,
        "rope_theta": 1e4,
    }
    fields.pop("rope_parameters", None)
    write_config(tmp_path, fields)
    decoder, spec = load_decoder(tmp_path, TEST_DEVICE)
    assert spec.shifted_logits
    assert spec.mask_token_id == 63
    assert not spec.block_causal
    visible = torch.zeros(3, 1, 11, 11)
    expected = model(IDS, attention_mask=visible).logits
    torch.testing.assert_close(logits_of(decoder), expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(expected, model(IDS).logits, atol=1e-2)


@torch.inference_mode()
def test_sdar_is_qwen3_with_a_block_causal_mask(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES, head_dim=8)
    model = save(Qwen3ForCausalLM, config, tmp_path)
    fields = config.to_dict() | {
        "architectures": ["SDARForCausalLM"],
        "mask_token_id": 63,
        "block_size": 4,
        "rope_theta": 1e4,
    }
    fields.pop("rope_parameters", None)
    write_config(tmp_path, fields)
    decoder, spec = load_decoder(tmp_path, TEST_DEVICE)
    assert spec.block_causal
    assert spec.block_length == 4
    blocks = torch.arange(11) // 4
    hidden = (blocks[:, None] < blocks).float() * torch.finfo(torch.float32).min
    expected = model(IDS, attention_mask=hidden.expand(3, 1, 11, 11)).logits
    torch.testing.assert_close(logits_of(decoder), expected, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    save(Qwen2ForCausalLM, Qwen2Config(**SIZES), tmp_path)
    decoder = load_causal_decoder(tmp_path)
    rows = [IDS[0], IDS[1, :4], IDS[2, :9], IDS[0, :4]]
    together = decoder(ForwardBatch.pack(rows)).split([len(row) for row in rows])
    for row, hidden in zip(rows, together, strict=True):
        alone = decoder(ForwardBatch.pack([row]))
        torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
