"""PyTorch Distributed Checkpoint (DCP) directories, read tensor by tensor without running pickles.

Format: `torch.distributed.checkpoint`, a `.metadata` file beside one or more `.distcp` files per
rank. The metadata is a pickle; only the classes that torch writes into it are let through. The
tensors are read by torch itself with `weights_only`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from vdiff_kserve.models.checkpoint_config import CheckpointError

METADATA_FILE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED_GLOBALS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *(
            (_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)
"""What a `.metadata` file may name, as (module, name), beside torch's number types."""
MODULES_BY_OTHER_NAMES = {"pathlib._local": "pathlib"}
"""Where Python 3.13, by which the file may be written, says that paths are defined."""


class DistributedCheckpoint:
    """A DCP directory.

    Attributes:
        tensors: dtype and shape of every tensor, by its name in the saved state.

    Raises:
        CheckpointError: the folder is no DCP directory, or its metadata is damaged or not torch's.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        metadata = self._reader.read_metadata()
        self.tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (entry.properties.dtype, tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """One tensor, put together from what the ranks wrote of it.

        Raises:
            CheckpointError: a file is missing, damaged or cut off.
        """
        dtype, shape = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no process group is there
                load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, RuntimeError, OSError, ValueError, EOFError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{self._reader.path}: {name} cannot be read: {reason}"
            ) from error
        return tensor


class _Reader(FileSystemReader):
    """torch's reader, with metadata that is read once and cannot name other classes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002  torch's signature
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path) / METADATA_FILE)
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        return self._metadata


def read_metadata(file: Path) -> Metadata:
    """The contents of a `.metadata` file.

    Raises:
        CheckpointError: there is none, it is damaged, or it names a class that torch does not
            write there, which could run code.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is no DCP directory: it has no {METADATA_FILE} file")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or not torch's: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds no DCP metadata")
    names = {str(stored.relative_path) for stored in metadata.storage_data.values()}
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{file} names files outside its folder: {min(outside)}")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        module = MODULES_BY_OTHER_NAMES.get(module, module)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)
