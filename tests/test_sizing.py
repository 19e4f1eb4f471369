from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.golden import GOLDEN_DIR
from tests.models.causal_folders import write_causal
from vdiff_kserve import sizing
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import bytes_per_token
from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.models import Decoder, DecoderConfig, load_causal_model
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.moe import Router
from vdiff_kserve.models.registry import FAMILIES, find_by_architecture

GIB = 1 << 30
LLADA_8B = {
    "vocab_size": 126464,
    "embedding_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "weight_tying": False,
}
"""The sizes of LLaDA-8B-Instruct, in the fields of the embedded model's config.json."""


@pytest.fixture(scope="module")
def llada_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada-8b")
    fields = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    tokens = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
    (folder / "config.json").write_text(json.dumps(fields | LLADA_8B | tokens), encoding="utf-8")
    return folder


def decoder(folder: Path) -> DecoderConfig:
    config = CheckpointConfig.read(folder)
    return find_by_architecture(config, FAMILIES).read_spec(config).decoder


def test_llada_8b_on_an_80_gib_gpu(llada_8b):
    found = sizing.size(llada_8b, 80 * GIB)
    assert found.weights == 2 * 8_015_581_184
    assert found.per_token == 2 * 32 * 4096 * 2
    assert found.request_tokens == 4096
    assert found.requests == 27


def test_a_model_that_does_not_fit(llada_8b, capsys):
    arguments = ["--model_dir", str(llada_8b), "--gpu_memory", "16GiB"]
    assert sizing.main(arguments) == 1
    assert "requests that fit with a cache                 0" in capsys.readouterr().out


def test_the_least_memory_is_just_enough(llada_8b):
    least = sizing.size(llada_8b, 80 * GIB).least_memory
    assert sizing.size(llada_8b, least + 8).requests == 1
    assert sizing.size(llada_8b, least - (1 << 20)).requests == 0


def test_weights_are_those_in_the_checkpoint():
    stored = 0
    with safe_open(EMBEDDED / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            stored += torch.Size(tensor.get_shape()).numel()
    assert sizing.weight_bytes(decoder(EMBEDDED), torch.float32) == stored * 4


@pytest.mark.parametrize("family", ["llada_moe", "llada2", "sdar"])
def test_every_layer_is_counted(family):
    """Whether it has an MLP or experts, whose routers are kept in float32."""
    config = decoder(next((GOLDEN_DIR / family).rglob("config.json")).parent)
    whole = Decoder(config)
    routers = [each for each in whole.modules() if isinstance(each, Router)]
    wide = sum(each.numel() for router in routers for each in router.parameters())
    assert bool(routers) == (family != "sdar")
    expected = 2 * sum(each.numel() for each in whole.parameters()) + 2 * wide
    assert sizing.weight_bytes(config, torch.bfloat16) == expected


def test_many_layers_take_no_longer():
    config = decoder(EMBEDDED)
    few = [sizing.weight_bytes(replace(config, num_layers=n), torch.float32) for n in (1, 2)]
    many = sizing.weight_bytes(replace(config, num_layers=1_000_001), torch.float32)
    assert many == few[0] + 1_000_000 * (few[1] - few[0])


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "mixtral", "deepseek_v3"])
def test_a_causal_model_is_sized_as_it_is_loaded(name, tmp_path):
    """The first one is the native decoder's, the others transformers'."""
    parameters = write_causal(name, tmp_path).num_parameters()
    model, spec = load_causal_model(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    found = sizing.size(tmp_path, GIB)
    assert found.weights == 2 * parameters
    assert found.per_token == bytes_per_token(model.config, torch.bfloat16)
    assert found.request_tokens == spec.max_model_len


def test_of_a_model_that_keeps_another_state_its_weights_are_told(tmp_path, capsys):
    parameters = write_causal("mamba", tmp_path).num_parameters()
    assert sizing.main(["--model_dir", str(tmp_path), "--gpu_memory", "8GiB"]) == 1
    assert f"its weights are {parameters:,} numbers" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_is_counted_as_the_engine_takes_it(dtype):
    config = decoder(EMBEDDED)
    per_token = bytes_per_token(config, dtype)
    store = KVCache(config, 10, torch.device("cpu"), dtype).store
    spare = 1  # the place that is lent to nobody
    assert store.keys.nbytes + store.values.nbytes == (10 + spare) * per_token


def test_an_auxiliary_model_adds_its_weights_and_its_cache():
    alone = sizing.size(EMBEDDED, GIB)
    both = sizing.size(EMBEDDED, GIB, auxiliary_dir=EMBEDDED / "apd")
    assert both.weights > alone.weights
    assert both.per_token > alone.per_token


def test_shorter_requests_and_other_numbers_are_asked_for(llada_8b, capsys):
    arguments = ["--model_dir", str(llada_8b), "--gpu_memory", "40GiB"]
    arguments += ["--max-model-len", "1024", "--gpu-memory-utilization=0.8"]
    assert sizing.main(arguments) == 0
    assert "of a request of 1024 tokens           512.00 MiB" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["lots", "-3GiB"])
def test_memory_that_is_no_size_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        sizing.main(["--model_dir", str(EMBEDDED), f"--gpu_memory={wrong}"])
    assert "--gpu_memory" in capsys.readouterr().err


def test_a_folder_without_a_config_is_an_error(tmp_path, capsys):
    assert sizing.main(["--model_dir", str(tmp_path), "--gpu_memory", "8GiB"]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model_dir", "--apd_model"])
def test_a_folder_that_does_not_exist_is_told(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    argv = ["--model_dir", str(EMBEDDED), "--gpu_memory", "8GiB", option, "/nope"]
    with pytest.raises(SystemExit):
        sizing.main(argv)
    assert f"{option} must be a folder that exists, got '/nope'" in capsys.readouterr().err
