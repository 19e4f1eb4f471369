"""From a checkpoint folder to the model that serves it, whoever implements it.

What runs on transformers is imported when a checkpoint needs it: that takes as long as all else.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from vdiff_kserve.models.causal import is_causal, load_causal_model
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError, Hints
from vdiff_kserve.models.language_model import LanguageModel
from vdiff_kserve.models.loader import load_decoder, weight_files
from vdiff_kserve.models.registry import DIFFUSION_GEMMA, find_family
from vdiff_kserve.models.spec import ModelSpec
from vdiff_kserve.models.tokenizer import missing_tokenizer


def check_folder(folder: Path, hints: Hints, *, trust_code: bool = False) -> ModelSpec | None:
    """Refuse a folder that cannot be served as far as `config.json` and the names of its files
    tell, which takes no time: its kind first, then all that is missing.

    Args:
        hints: the tokenizer's mask may be left out of them.
        trust_code: whether a tokenizer may be made by the checkpoint's own code.

    Returns:
        what `config.json` says of a diffusion model that the native decoder runs; None for others.

    Raises:
        CheckpointError: it cannot be served.
    """
    spec = None
    if _is_native(folder, hints):
        mask = 0 if hints.tokenizer_mask_token_id is None else hints.tokenizer_mask_token_id
        config = CheckpointConfig.read(folder, replace(hints, tokenizer_mask_token_id=mask))
        spec = find_family(config).read_spec(config)
    missing = []
    try:
        weight_files(folder)
    except CheckpointError as error:
        missing.append(str(error))
    with suppress(ValueError, OSError, AttributeError):  # told when the tokenizer is read
        missing.append(missing_tokenizer(folder, trust_code))
    if any(missing):
        raise CheckpointError(". ".join(filter(None, missing)))
    return spec


def _is_native(folder: Path, hints: Hints | None) -> bool:
    """Whether a checkpoint is a diffusion model that the native decoder runs."""
    if hints is not None and hints.family is not None:
        return True
    return not _is_gemma(folder) and not is_causal(folder)


def _is_gemma(folder: Path) -> bool:
    return DIFFUSION_GEMMA in CheckpointConfig.read(folder).architectures


def load_served_model(
    folder: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    hints: Hints | None = None,
    quantization: str | None = None,
    spread: str | None = None,
) -> tuple[LanguageModel, ModelSpec]:
    """Read any checkpoint that is served; the arguments are those of `load_decoder`.

    Raises:
        CheckpointError: anything wrong with the folder, or an option that is not for its model.
    """
    folder = Path(folder)
    if _is_native(folder, hints):
        return load_decoder(folder, device, dtype, mesh, hints, quantization, spread)
    if spread:
        raise CheckpointError(f"--device_map {spread} is for models that the native decoder runs")
    if not _is_gemma(folder):
        return load_causal_model(folder, device, dtype, mesh, quantization)
    from vdiff_kserve.models.diffusion_gemma import load_diffusion_gemma

    return load_diffusion_gemma(folder, device, dtype, mesh, quantization)
