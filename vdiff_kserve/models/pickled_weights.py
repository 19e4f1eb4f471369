"""Weights saved by `torch.save`, read without running pickles, to be converted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vdiff_kserve.models.checkpoint_config import CheckpointError

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def pickle_files(folder: Path) -> list[Path]:
    """The folder's files that hold pickled weights by their names."""
    return sorted(file for pattern in PICKLE_PATTERNS for file in folder.glob(pattern))


class PickledWeights:
    """A folder of such files, each with a dictionary of tensors; the files are mapped, not read.

    Attributes:
        tensors: dtype and shape of every tensor, by name.

    Raises:
        CheckpointError: there is no such file, or one is damaged, or holds something else than
            tensors, which could run code.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder that exists")
        self._tensors: dict[str, Tensor] = {}
        for file in pickle_files(folder):
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise CheckpointError(f"{file} cannot be read safely: {reason}") from error
            values = content.values() if isinstance(content, dict) else [content]
            if not all(isinstance(value, Tensor) for value in values):
                raise CheckpointError(f"{file} does not hold tensors by their names alone")
            self._tensors |= content
        if not self._tensors:
            raise CheckpointError(f"{folder} has no weights in {', '.join(PICKLE_PATTERNS)}")
        self.tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]
