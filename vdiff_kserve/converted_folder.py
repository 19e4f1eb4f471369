"""A folder of safetensors files as it is written: tensors in shards, checksums, the index last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vdiff_kserve import hub
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.models.distributed_checkpoint import DistributedCheckpoint
from vdiff_kserve.models.loader import INDEX_FILE
from vdiff_kserve.models.pickled_weights import PickledWeights
from vdiff_kserve.models.safetensors_file import TensorWriter, read_header

PART = ".part"
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of every tensor by name, in the order in which they are written."""
Source = DistributedCheckpoint | PickledWeights


def split(layout: Layout, shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in layout:
        if groups[-1] and size + bytes_of(layout, name) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_of(layout, name)
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, start=1)}


def bytes_of(layout: Layout, name: str) -> int:
    """What a tensor takes in its file."""
    dtype, shape = layout[name]
    return torch.Size(shape).numel() * dtype.itemsize


def write_shard(
    file: Path,
    layout: Layout,
    source: Source,
    prefix: str,
    progress: tqdm,
) -> str:
    """Returns the file's SHA-256; until it is whole it has another name."""
    part = file.with_name(file.name + PART)
    with part.open("wb") as stream:
        writer = TensorWriter(stream, layout)
        for name, (dtype, _) in layout.items():
            tensor = source.read(prefix + name)
            _require_finite(tensor, prefix + name)
            writer.add(name, tensor.to(dtype))
            progress.update(bytes_of(layout, name))
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(file)
    return writer.sha256.hexdigest()


def _require_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and tensor.numel() and not tensor.isfinite().all():
        raise CheckpointError(f"{name} has values that are not finite")


def copy_description(base: Path, output: Path) -> None:
    """Configuration and tokenizer; no code, no weights."""
    for pattern in hub.DESCRIPTION:
        for file in base.glob(pattern):
            if file.name != INDEX_FILE:
                shutil.copyfile(file, output / file.name)


def verify(output: Path, layout: Layout, shards: Mapping[str, Sequence[str]]) -> None:
    """Compare the headers of what was written with what was wanted."""
    for file, names in shards.items():
        stored = {name: (t.dtype, t.shape) for name, t in read_header(output / file).items()}
        if stored != {name: layout[name] for name in names}:
            raise CheckpointError(f"{output / file} does not hold what was written to it")


def write_index(output: Path, layout: Layout, shards: Mapping[str, Sequence[str]]) -> None:
    """Say which file holds which tensor; a folder that has it is complete."""
    index = {
        "metadata": {"total_size": sum(bytes_of(layout, name) for name in layout)},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_text(output / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def checksums(digests: Mapping[str, str]) -> str:
    """As `sha256sum --check` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def write_text(file: Path, text: str) -> None:
    """Write a whole file or none."""
    part = file.with_name(file.name + PART)
    part.write_text(text, encoding="utf-8")
    part.rename(file)


def sha256(file: Path) -> str | None:
    """A file's checksum; None where there is no file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
