"""From a checkpoint folder to the model that serves it, whoever implements it.

What runs on transformers is imported when a checkpoint needs it: that takes as long as all else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from vdiff_kserve.models.causal import is_causal, load_causal_model
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError, Hints
from vdiff_kserve.models.language_model import LanguageModel
from vdiff_kserve.models.loader import load_decoder
from vdiff_kserve.models.registry import DIFFUSION_GEMMA
from vdiff_kserve.models.spec import ModelSpec


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
    named = hints is not None and hints.family is not None
    is_gemma = not named and DIFFUSION_GEMMA in CheckpointConfig.read(folder).architectures
    if not is_gemma and (named or not is_causal(folder)):
        return load_decoder(folder, device, dtype, mesh, hints, quantization, spread)
    if spread:
        raise CheckpointError(f"--device_map {spread} is for models that the native decoder runs")
    if not is_gemma:
        return load_causal_model(folder, device, dtype, mesh, quantization)
    from vdiff_kserve.models.diffusion_gemma import load_diffusion_gemma

    return load_diffusion_gemma(folder, device, dtype, mesh, quantization)
