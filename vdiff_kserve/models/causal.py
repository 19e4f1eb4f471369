"""Causal language models of the hub, served token by token.

A checkpoint whose layout the native decoder reads runs on it. Any other runs on transformers' own
implementation (never on code from the checkpoint), with the engine's attention in the place of
transformers', so that requests are batched and cached as everywhere else. Where that is not
possible (models with a recurrent state), rows run one by one and without a cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.language_model import LanguageModel
from vdiff_kserve.models.loader import load_causal_decoder
from vdiff_kserve.models.registry import CAUSAL_FORMATS, FAMILIES
from vdiff_kserve.models.spec import ModelSpec

PROFILE_NAMES = ("exact", "quality", "fast")
"""All alike here: there is one way to write a token after the other."""


def is_causal(folder: Path | str) -> bool:
    """Whether a checkpoint is a causal language model, and no diffusion model.

    Raises:
        CheckpointError: its `config.json` does not say what it is.
    """
    names = CheckpointConfig.read(Path(folder)).architectures
    if any(name in FAMILIES for name in names):
        return False
    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names)


def load_causal_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
    quantization: str | None = None,
) -> tuple[LanguageModel, ModelSpec]:
    """Read a causal language model to be served itself.

    Args:
        mesh: ranks that share a model.
        quantization: of its weights. Both are for models that the native decoder runs.

    Raises:
        CheckpointError: anything wrong with the folder, in one message.
    """
    folder = Path(folder)
    config = CheckpointConfig.read(folder)
    model: LanguageModel
    if native_layout(config) is not None:
        model = load_causal_decoder(folder, device, dtype, mesh, quantization)
        longest, cacheable = config.context("max_position_embeddings"), True
    elif mesh is not None or quantization is not None:
        option = "--tensor_parallel_size" if quantization is None else "--quantization"
        raise CheckpointError(f"{folder}: {option} is not for models that transformers runs")
    else:
        from vdiff_kserve.models.transformers_model import load_transformers_model  # seconds

        model, longest, cacheable = load_transformers_model(folder, device, dtype)
    decoding = {"block_length": 1, "cache": "exact" if cacheable else "none"}
    ends = _end_token_ids(folder, config, model.config.vocab_size)
    return model, ModelSpec(
        family=str(config.get("model_type") or "causal"),
        decoder=model.config,
        mask_token_id=None,
        eos_token_id=ends[0],
        eot_token_id=None,
        max_model_len=longest,
        block_length=1,
        profiles=dict.fromkeys(PROFILE_NAMES, decoding),
        shifted_logits=True,
        autoregressive=True,
        cacheable=cacheable,
        more_end_token_ids=ends[1:],
    )


def native_layout(config: CheckpointConfig) -> DecoderConfig | None:
    """What the native decoder makes of a checkpoint; None when it has something that it lacks."""
    for name in config.architectures:
        if name in CAUSAL_FORMATS:
            try:
                return CAUSAL_FORMATS[name].read_decoder(config)
            except CheckpointError:
                return None
    return None


def _end_token_ids(folder: Path, config: CheckpointConfig, vocab_size: int) -> tuple[int, ...]:
    """From `generation_config.json`, which chat models end their turns by, else `config.json`."""
    file = folder / "generation_config.json"
    given: Any = None
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a JSON object: {error}") from error
    for fields in (config.get, (config.get("text_config") or {}).get):
        given = fields("eos_token_id") if given is None else given
    ends = given if isinstance(given, list) else [given]
    valid = [i for i in ends if isinstance(i, int) and 0 <= i < vocab_size]
    if not valid or len(valid) < len(ends):
        raise config.error("eos_token_id", f"must be a token id or several, not {given!r}")
    return tuple(valid)
