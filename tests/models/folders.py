"""Random checkpoint folders in published formats, LLaDA's above all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vdiff_kserve.models import Decoder
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.registry import find_family
from vdiff_kserve.models.tensor_names import tensor_shape

CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 60,
    "embedding_size": 64,
    "max_sequence_length": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_full_precision": True,
    "weight_tying": False,
    "mask_token_id": 63,
    "eos_token_id": 62,
}


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their published names."""
    hidden, inner, vocab = (
        config[name] for name in ("d_model", "mlp_hidden_size", "embedding_size")
    )
    keys = hidden // config["n_heads"] * config["n_kv_heads"]
    shapes = {"wte.weight": (vocab, hidden), "ln_f.weight": (hidden,)}
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = (vocab, hidden)
    for layer in range(config["n_layers"]):
        block = {
            "attn_norm": (hidden,),
            "q_proj": (hidden, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "attn_out": (hidden, hidden),
            "ff_norm": (hidden,),
            "ff_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "ff_out": (hidden, inner),
        }
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.transformer.{name}": torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights for the `config.json` of any family, under their published names."""
    checkpoint = CheckpointConfig(Path("config.json"), config)
    family = find_family(checkpoint)
    with torch.device("meta"):
        decoder = Decoder(family.read_spec(checkpoint).decoder)
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor_shape(places), generator=generator) * 0.1
        for name, places in family.tensor_names.places(shapes).items()
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_single(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    write_config(folder, config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int
) -> Path:
    """The same in several files of about as many tensors, with an index."""
    write_config(folder, config)
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
