"""What the operator, the tokenizer and the checkpoint's name add to its `config.json`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.models.folders import CONFIG, tensors_of, write_config, write_single
from tests.models.test_causal_formats import IDS, SIZES, logits_of, save
from vdiff_kserve.config import DIFFUSION_FAMILIES
from vdiff_kserve.models import CheckpointError, Hints, load_decoder
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.registry import FAMILIES, FAMILY_NAMES, find_family

SDAR: dict[str, Any] = SIZES | {
    "architectures": ["SDARForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "mask_token_id": 63,
}


@pytest.mark.parametrize(
    ("hints", "in_config", "expected"),
    [
        (Hints(mask_token_id=5, tokenizer_mask_token_id=7), 63, 5),
        (Hints(tokenizer_mask_token_id=7), 63, 63),
        (Hints(tokenizer_mask_token_id=7), None, 7),
        (Hints(mask_token_id=0), None, 0),
    ],
)
def test_mask_is_the_operators_then_the_configs_then_the_tokenizers(
    tmp_path: Path, hints: Hints, in_config: int | None, expected: int
) -> None:
    config = CONFIG | {"mask_token_id": in_config}
    folder = write_single(tmp_path, config, tensors_of(config))
    assert load_decoder(folder, hints=hints)[1].mask_token_id == expected


@pytest.mark.parametrize(
    ("name", "in_config", "expected"),
    [
        ("GSAI-ML/iLLaDA-8B-Instruct", None, 5),
        ("illada-8b", None, 5),
        ("GSAI-ML/iLLaDA-8B-Base", 63, 63),
    ],
)
def test_illada_has_another_mask(
    tmp_path: Path, name: str, in_config: int | None, expected: int
) -> None:
    config = CONFIG | {"mask_token_id": in_config}
    folder = write_single(tmp_path, config, tensors_of(config))
    assert load_decoder(folder, hints=Hints(name=name))[1].mask_token_id == expected


def test_mask_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_single(tmp_path, CONFIG, tensors_of(CONFIG))
    with pytest.raises(CheckpointError, match="from 0 to 63, not 64"):
        load_decoder(folder, hints=Hints(mask_token_id=64))


def test_mask_that_nothing_names_is_asked_for(tmp_path: Path) -> None:
    config = CONFIG | {"mask_token_id": None}
    folder = write_single(tmp_path, config, tensors_of(config))
    with pytest.raises(CheckpointError, match=r"missing.* 126336, is beyond.* by --mask_token_id"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("hints", "in_config", "expected"),
    [
        (Hints(block_length=16, name="SDAR-8B-Chat-b32"), 8, 16),
        (Hints(name="SDAR-8B-Chat-b32"), 8, 8),
        (Hints(name="JetLM/SDAR-8B-Chat-b32"), None, 32),
        (Hints(name="JetLM/SDAR-8B-Chat"), None, 4),
    ],
)
def test_block_length_is_the_operators_then_the_configs_then_the_names(
    tmp_path: Path, hints: Hints, in_config: int | None, expected: int
) -> None:
    write_config(tmp_path, SDAR | {"block_size": in_config})
    config = CheckpointConfig.read(tmp_path, hints)
    spec = find_family(config).read_spec(config)
    assert spec.block_length == expected
    assert spec.decoder.attention_block == expected


def test_without_hints_the_folder_names_the_block_length(tmp_path: Path) -> None:
    write_config(tmp_path / "SDAR-1.7B-Chat-b16", SDAR)
    config = CheckpointConfig.read(tmp_path / "SDAR-1.7B-Chat-b16")
    assert find_family(config).read_spec(config).block_length == 16


@torch.inference_mode()
def test_open_dcoder_is_read_as_dream_when_its_family_is_named(tmp_path: Path) -> None:
    """Its `config.json` says Qwen2, its mask is the tokenizer's, its head is the embedding."""
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    model = save(Qwen2ForCausalLM, config, tmp_path)
    with pytest.raises(CheckpointError, match="Qwen2ForCausalLM"):
        load_decoder(tmp_path)
    hints = Hints(family="dream", tokenizer_mask_token_id=61)
    decoder, spec = load_decoder(tmp_path, hints=hints)
    assert spec.mask_token_id == 61
    assert spec.shifted_logits
    expected = model(IDS, attention_mask=torch.zeros(3, 1, 11, 11)).logits
    torch.testing.assert_close(logits_of(decoder), expected, atol=2e-5, rtol=2e-5)


def test_every_family_can_be_named() -> None:
    named = [FAMILIES[architecture] for architecture in FAMILY_NAMES.values()]
    assert all(family in named for family in FAMILIES.values())
    assert set(DIFFUSION_FAMILIES) == set(FAMILY_NAMES)
