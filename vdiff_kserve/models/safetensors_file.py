"""Tensors of safetensors files, read and written by plain reads and writes, one at a time.

A file mapped to memory counts as the process's own, arrives page by page, and is slow on network
file systems; so files are read in pieces, several at once, each straight to where it is wanted.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdiff_kserve.models.checkpoint_config import CheckpointError, is_lfs_pointer

PIECE_BYTES = 4 * 2**20
READERS = 8
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk, in row-major order.

    Attributes:
        offset: of its first byte.
        run: how many of its elements lie end to end; None is all of them.
        stride: elements from the beginning of one run to that of the next.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    run: int | None = None
    stride: int = 0

    def part(self, dim: int, start: int, length: int) -> StoredTensor:
        """Some entries along one dimension of a whole tensor."""
        inner = math.prod(self.shape[dim + 1 :])
        return replace(
            self,
            offset=self.offset + start * inner * self.dtype.itemsize,
            shape=(*self.shape[:dim], length, *self.shape[dim + 1 :]),
            run=length * inner,
            stride=self.shape[dim] * inner,
        )

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Where `count` elements from `start` on lie: (position in the file, elements) of each."""
        run = self.run or math.prod(self.shape)
        while count > 0:
            number, within = divmod(start, run)
            length = min(run - within, count)
            yield self.offset + (number * self.stride + within) * self.dtype.itemsize, length
            start, count = start + length, count - length

    def rows(self, first: int, shape: tuple[int, ...]) -> StoredTensor:
        """The part of `shape` that begins with row `first`."""
        skipped = first * math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + skipped, shape=shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: the file is damaged or cut off.
    """
    try:
        with safe_open(str(file), framework="pt"):
            pass  # the library compares the header with the file's length
    except SafetensorError as error:
        if is_lfs_pointer(file):
            raise CheckpointError(f"{file} is a pointer: run `git lfs pull` there") from error
        raise CheckpointError(f"{file} is damaged or cut off: {error}") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has the unknown type {entry['dtype']}")
        offset = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        stored[name] = StoredTensor(file, offset, DTYPES[entry["dtype"]], shape)
    return stored


def returnable(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that goes back to the system when freed; an allocator would keep it."""
    return torch.frombuffer(mmap.mmap(-1, max(count, 1) * dtype.itemsize), dtype=dtype)


class TensorReader:
    """Reads stored tensors into given ones, in pieces on several threads.

    What can be read in place is. What is to be converted, or is for another device, passes through
    one piece of memory per thread, while the next pieces are being read.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._staging: list[Tensor] = []

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[TensorReader]:
        """A reader whose files and threads end with the block."""
        reader = cls()
        try:
            yield reader
        finally:
            reader._pool.shutdown(cancel_futures=True)
            for descriptor in reader._files.values():
                os.close(descriptor)

    def fill(self, target: Tensor, stored: StoredTensor) -> None:
        """Read a tensor into `target`: contiguous, of its shape, on any device, of any dtype.

        Raises:
            CheckpointError: the file ends too early.
        """
        flat = target.view(-1)
        descriptor = self._descriptor(stored.file)
        direct = target.dtype == stored.dtype and target.device.type == "cpu"
        step = PIECE_BYTES // stored.dtype.itemsize
        pending: deque[tuple[Future[bool], Tensor, Tensor]] = deque()
        for number, start in enumerate(range(0, len(flat), step)):
            if len(pending) == READERS:
                _finish(*pending.popleft(), stored.file)
            piece = flat[start : start + step]
            memory = piece
            if not direct:
                self._allocate(pinned=target.is_cuda)
                bytes_read = self._staging[number % READERS][: len(piece) * stored.dtype.itemsize]
                memory = bytes_read.view(stored.dtype)
            reading = self._pool.submit(_read_pieces, descriptor, memory, stored, start)
            pending.append((reading, memory, piece))
        while pending:
            _finish(*pending.popleft(), stored.file)

    def _allocate(self, pinned: bool) -> None:
        """Memory for pieces on their way; GPUs copy fastest from pinned one."""
        if self._staging:
            return
        for _ in range(READERS):
            memory = returnable(PIECE_BYTES, torch.uint8)
            self._staging.append(memory.pin_memory() if pinned else memory)

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]


def _finish(reading: Future[bool], memory: Tensor, piece: Tensor, file: Path) -> None:
    if not reading.result():
        raise CheckpointError(f"{file} is damaged or cut off: it ends too early")
    if memory is not piece:
        piece.copy_(memory)


def _read_pieces(descriptor: int, target: Tensor, stored: StoredTensor, start: int) -> bool:
    """Read `target`'s elements, which are those of `stored` from `start` on."""
    pieces = list(stored.pieces(start, len(target)))
    parts = target.split([length for _, length in pieces])
    return all(
        _read_fully(descriptor, part, position)
        for part, (position, _) in zip(parts, pieces, strict=True)
    )


def _read_fully(descriptor: int, target: Tensor, position: int) -> bool:
    memory = target.view(torch.uint8).numpy().data
    while memory:
        count = os.preadv(descriptor, [memory], position)
        if count == 0:
            return False
        memory = memory[count:]
        position += count
    return True


class TensorWriter:
    """Writes a safetensors file tensor by tensor, so that none but the current one is in memory.

    Args:
        layout: dtype and shape of every tensor by name, in the order in which they will come.

    Attributes:
        sha256: of what is written so far.
    """

    def __init__(
        self, stream: IO[bytes], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self._stream = stream
        self._layout = layout
        self.sha256 = hashlib.sha256()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in layout.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; it must be the next one of the layout."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._layout[name], name
        self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.sha256.update(data)
