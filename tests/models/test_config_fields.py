"""Whatever a config.json holds, it is read or refused with a message that names a field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GOLDEN_DIR
from tests.models.folders import write_config
from vdiff_kserve.models import CheckpointError, load_decoder
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.registry import CAUSAL_FORMATS, find_by_architecture, find_family

FAMILIES = ("llada", "dream", "sdar", "fast_dllm_v2", "llada_moe", "llada2")
VALUES: tuple[Any, ...] = (
    None, "x", "", -1, 0, 0.5, True, [], [None], {}, {"rope_type": 5}, float("nan"), float("inf"),
    10**9, 10**12, 2**63, 10**400, -(10**9), 1e300, 1e-300, "x" * 10**4,
)  # fmt: skip
MAX_MESSAGE = 300


def read(family: str, changes: dict[str, Any]) -> DecoderConfig:
    path = GOLDEN_DIR / family / "config.json"
    config = CheckpointConfig(path, json.loads(path.read_text(encoding="utf-8")) | changes)
    if family == "apd":
        return find_by_architecture(config, CAUSAL_FORMATS).read_decoder(config)
    return find_family(config).read_spec(config).decoder


@pytest.mark.parametrize("family", [*FAMILIES, "apd"])
def test_no_value_of_any_field_of_a_golden_config_is_a_traceback(family: str) -> None:
    fields = json.loads((GOLDEN_DIR / family / "config.json").read_text(encoding="utf-8"))
    told = []
    for field in fields:
        for value in VALUES:
            try:
                read(family, {field: value})
            except CheckpointError as error:
                told.append(str(error))
    assert len(told) > 50
    assert [message for message in told if "config.json: field `" not in message] == []
    assert [message for message in told if len(message) > MAX_MESSAGE] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_several_end_tokens_all_end_an_answer(family: str) -> None:
    path = GOLDEN_DIR / family / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": [7, 9, 8]}
    config = CheckpointConfig(path, fields)
    spec = find_family(config).read_spec(config)
    assert spec.eos_token_id == 7
    assert set(spec.end_token_ids) >= {7, 8, 9}


def test_both_class_names_of_llada_moe_are_read_alike() -> None:
    """`inclusionAI/LLaDA-MoE-7B-A1B-Base` names the one without a head."""
    names = ["LLaDAMoEModel"]
    assert read("llada_moe", {"architectures": names}) == read("llada_moe", {})


def test_dreamon_is_not_taken_for_dream() -> None:
    with pytest.raises(CheckpointError, match="field `expand_token_id`: DreamOn"):
        read("dream", {"expand_token_id": 151667})


def test_dream_decodes_any_answer_as_one_block_like_its_authors() -> None:
    config = CheckpointConfig.read(GOLDEN_DIR / "dream")
    spec = find_family(config).read_spec(config)
    assert spec.profiles["exact"]["block_length"] >= spec.max_model_len
    assert "block_length" not in spec.profiles["quality"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_that_the_files_contradict_is_built(family: str, tmp_path: Path) -> None:
    """Neither a million layers nor experts: the message comes as fast as any other."""
    golden = GOLDEN_DIR / family
    (tmp_path / "model.safetensors").symlink_to(golden / "model.safetensors")
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    sizes = [field for field, value in config.items() if type(value) is int]
    told = {}
    for field in sizes:
        write_config(tmp_path, config | {field: 60_000})
        try:
            load_decoder(tmp_path)
        except CheckpointError as error:
            told[field] = str(error)
    layers = "n_layers" if family == "llada" else "num_hidden_layers"
    assert f"It says 60000 layers, the files have {config[layers]}. " in told[layers]
    assert "or more missing: " in told[layers]
    if "num_experts" in config:
        said = f"It says 60000 experts, the files have {config['num_experts']}. "
        assert said in told["num_experts"]
    assert [message for message in told.values() if "config.json" not in message] == []


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, '{"a": ' + "9" * 10**4 + "}", "\udcff"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|must hold)"):
        CheckpointConfig.read(tmp_path)


@pytest.mark.parametrize("theta", ["x", None, -1, True, float("nan")])
def test_a_rotary_base_inside_rope_parameters_is_checked_too(theta: object) -> None:
    parameters = {"rope_type": "default", "rope_theta": theta}
    with pytest.raises(CheckpointError, match="field `rope_theta`"):
        read("dream", {"rope_theta": None, "rope_parameters": parameters})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_part_that_rotates_is_read_wherever_it_stands(name: str) -> None:
    """transformers 5 moves it into `rope_parameters`."""
    partly = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    absent = {"partial_rotary_factor": None, "rotary_dim": None}
    assert read("llada2", absent).rotary_dim == read("llada2", absent).head_dim
    moved = read("llada2", absent | {"rope_theta": None, name: partly})
    assert (moved.rotary_dim, moved.rope_theta) == (moved.head_dim // 2, 5e5)
    for whole_heads in ("dream", "sdar", "fast_dllm_v2"):
        with pytest.raises(CheckpointError, match="field `partial_rotary_factor`"):
            read(whole_heads, {name: partly})


def test_a_count_beyond_the_layers_is_all_of_them() -> None:
    read("llada2", {"first_k_dense_replace": 10**6})
