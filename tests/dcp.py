"""Distributed checkpoints as a training run of two ranks writes them.

    python -m tests.dcp FOLDER SAFETENSORS [SAFETENSORS ...]

writes one directory per file and layout below FOLDER: `FILE-PARENT/whole` has the weights under
`model.` beside an optimizer, `FILE-PARENT/weights` has them alone under `model.model.`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(folder: Path, files: list[Path]) -> Path:
    """Run two ranks that write `files`."""
    command = [sys.executable, "-m", "tests.dcp", str(folder), *map(str, files)]
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen(command, cwd=root, env=os.environ | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    return folder


def _state(tensors: dict[str, Tensor], prefix: str, optimizer: bool) -> dict[str, Any]:
    """What a run saves: each rank's half of every tensor, some of them whole on both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    split = {
        name: distribute_tensor(tensor, mesh, [Replicate() if "norm" in name else Shard(0)])
        for name, tensor in tensors.items()
    }
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in split.items()}
    if optimizer:
        moments = {
            name: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": torch.tensor(3.0)}
            for name, tensor in split.items()
        }
        groups = [{"lr": 1e-3, "params": list(split)}]
        state |= {"optimizer": {"state": moments, "param_groups": groups}, "step": 3}
    return state


def _main() -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoints
    from safetensors.torch import load_file

    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1]).resolve()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for file in map(Path, sys.argv[2:]):
        tensors = load_file(file)
        for name, prefix, optimizer in (
            ("whole", "model.", True),
            ("weights", "model.model.", False),
        ):
            target = folder / file.parent.name / name
            checkpoints.save(_state(tensors, prefix, optimizer), checkpoint_id=target)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
