"""Models that one GPU does not hold: blocks whose weights wait on other GPUs or in host memory.

Every block is computed on the first GPU, where the caches are. The weights of one kept elsewhere
are copied there for its part of each pass and dropped after it, so that a model runs that does not
fit, at the speed of the copies. `accelerate` plans and copies; for speed, shard a model instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import get_balanced_memory
from torch import Tensor

from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.decoder import Decoder
from vdiff_kserve.models.host_memory import free_host_memory

SPREADS = ("auto", "balanced")
FIRST_GPU_SHARE = 0.7
"""What weights may take of the first GPU; the rest is for caches, copies and scratch."""
SHARE = 0.9
Memory = Mapping[int | str, int]


def free_memory() -> Memory:
    """Bytes that weights may take of every GPU, by number, and of the host, `cpu`."""
    gpus = range(torch.cuda.device_count())
    free = {i: torch.cuda.mem_get_info(i)[0] for i in gpus}
    shares = {i: FIRST_GPU_SHARE if i == 0 else SHARE for i in gpus}
    memory: dict[int | str, int] = {i: int(free[i] * shares[i]) for i in gpus}
    return memory | {"cpu": int(free_host_memory() * SHARE)}


def place_modules(
    decoder: Decoder, spread: str, dtype: torch.dtype, memory: Memory
) -> dict[str, torch.device]:
    """Where the weights of the embedding, each block, the norm and the head are kept, by name.

    Args:
        spread: `auto` fills the first GPU, then the next, then the host; `balanced` gives every
            GPU about as much.
        memory: as `free_memory` has it.

    Raises:
        CheckpointError: the model does not fit, or there are no GPUs to balance.
    """
    gpus = sum(isinstance(device, int) for device in memory)
    if spread == "balanced" and gpus < 2:
        raise CheckpointError(f"--device_map balanced needs two GPUs or more; there are {gpus}")
    blocks = ["Block"]
    limits = dict(memory)
    if spread == "balanced":
        limits = get_balanced_memory(decoder, limits, blocks, dtype)
    plan = infer_auto_device_map(decoder, limits, blocks, dtype, clean_result=False)
    if "disk" in plan.values():
        needed = sum(p.numel() for p in decoder.parameters()) * dtype.itemsize
        raise CheckpointError(
            f"--device_map {spread}: the weights need {needed / 1e9:.1f} GB, GPUs and host have "
            f"room for {sum(memory.values()) / 1e9:.1f} GB"
        )
    if gpus and plan["embed_tokens"] != 0:
        raise CheckpointError(
            f"--device_map {spread}: the first GPU has no room for the embedding and a block "
            f"beside the caches; {memory[0] / 1e9:.1f} GB are for weights"
        )
    if (together := plan.pop("layers", None)) is not None:  # a list, which is never called itself
        plan |= {f"layers.{layer}": together for layer in range(len(decoder.layers))}
    return {
        name: torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
        for name, where in plan.items()
    }


def compute_on(decoder: Decoder, devices: Mapping[str, torch.device], main: torch.device) -> None:
    """Let the modules whose weights are elsewhere bring them to `main` when they are computed."""
    for name, device in devices.items():
        if device == main:
            continue
        module = decoder.get_submodule(name)
        weights = {key: _kept(p.data, main) for key, p in module.named_parameters()}
        hook = AlignDevicesHook(
            execution_device=main, offload=True, weights_map=weights, place_submodules=True
        )
        add_hook_to_module(module, hook)


def _kept(weight: Tensor, main: torch.device) -> Tensor:
    return weight.pin_memory() if main.type == "cuda" and weight.device.type == "cpu" else weight
