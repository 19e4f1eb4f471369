"""Which device and dtype a model runs in when the user says `auto`."""

from __future__ import annotations

import torch

from vdiff_kserve.cpu_library import cpu_flags
from vdiff_kserve.models.checkpoint_config import CheckpointError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "half": torch.float16,
    "float": torch.float32,
}
"""Accepted names, as vLLM's `--dtype` has them."""

BFLOAT16_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one, else the CPU.

    Raises:
        CheckpointError: a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        seen = "no GPU" if not found else "GPU 0" if found == 1 else f"GPUs 0 to {found - 1}"
        raise CheckpointError(f"there is no device {name}: PyTorch {torch.__version__} sees {seen}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return DTYPES[name]
    native = device.type != "cpu" or bool(cpu_flags() & BFLOAT16_CPU_FLAGS)
    return torch.bfloat16 if native else torch.float32
