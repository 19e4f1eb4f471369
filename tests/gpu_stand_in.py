"""A GPU that is none, for tests that ask how often the host waits for it.

While a `GpuStandIn` is entered, tensors "on" `cuda:0` are `RemoteTensor`s: they say that they are
there, compute on the CPU, and every use of one that would make the host wait for a real GPU is
noted. What torch does in Python and what the engine chooses by a tensor's device is as on a GPU;
what CUDA itself does is not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

TO_THE_HOST = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
OF_UNKNOWN_SIZE = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
OF_UNKNOWN_SIZE |= {"bincount", "isin"}
"""The host must know how many there are. `isin` sorts and drops doubles when both are long."""
BLOCKING = "a copy of pageable memory, or one that blocks"
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
METADATA = {"size", "stride", "dim", "numel", "__len__", "element_size", "is_contiguous"}
METADATA |= {"is_floating_point", "is_complex", "is_inference", "storage_offset"}


class RemoteTensor(Tensor):
    """A tensor that says it is on the GPU; its numbers are in `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> RemoteTensor:
        shape, strides, offset = inner.shape, inner.stride(), inner.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides, offset, dtype=inner.dtype, device=GPU
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> None:
        raise AssertionError(f"{func} ran outside of the stand-in")


class GpuStandIn(TorchFunctionMode):
    """Runs what concerns remote tensors, and notes in `waits` what a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], _: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name in METADATA or (name == "__get__" and args[0] is not None):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute in ("T", "mT") and isinstance(args[0], RemoteTensor):
                return RemoteTensor(getattr(args[0].inner, attribute))
            return func(*args, **kwargs)
        if name == "pin_memory" or kwargs.pop("pin_memory", False):
            return self._pin(func, args, kwargs)
        device = kwargs.get("device")
        if name == "to":
            device = next((a for a in args[1:] if isinstance(a, (str, torch.device))), device)
        target = None if device is None else torch.device(device).type
        leaves = tree_leaves((args, kwargs))
        if target != "cuda" and not any(isinstance(leaf, RemoteTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if name == "to" and target is not None:
            return self._move(args[0], target, args, kwargs)
        self._note_waits(name, args, kwargs)
        if name == "cpu":
            return args[0].inner.clone()
        if target == "cuda":
            kwargs["device"] = "cpu"
        plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        same = (leaf for leaf in leaves if isinstance(leaf, RemoteTensor) and leaf.inner is result)
        if name in TO_THE_HOST or (found := next(same, None)) is None:
            return result if name in TO_THE_HOST else tree_map(_remote, result)
        return found

    def _pin(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """A pinned copy of a tensor, or a new one that `func` makes."""
        if func.__name__ == "pin_memory" and isinstance(args[0], RemoteTensor):
            raise RuntimeError("only memory of the host can be pinned")
        made = args[0].clone() if func.__name__ == "pin_memory" else func(*args, **kwargs)
        self._pinned.append(made)
        return made

    def _move(self, tensor: Tensor, target: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """`Tensor.to` another device."""
        dtype = next((a for a in args[1:] if isinstance(a, torch.dtype)), kwargs.get("dtype"))
        here = isinstance(tensor, RemoteTensor)
        moved = _inner(tensor).to(dtype or tensor.dtype, copy=True)
        asynchronous = kwargs.get("non_blocking", False)
        if target == "cpu":
            if not asynchronous:
                self._note("a copy to the host")
            return moved
        if not here and not (asynchronous and self._is_pinned(tensor)):
            self._note(BLOCKING)
        return RemoteTensor(moved)

    def _note_waits(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if name in TO_THE_HOST or name in OF_UNKNOWN_SIZE:
            self._note(name)
        elif name == "tensor":
            self._note("a tensor made on the device of the host's numbers")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._note("repeat_interleave without output_size")
        elif name == "copy_":
            source, asynchronous = args[1], kwargs.get("non_blocking", False)
            if _mixed(args) and not (asynchronous and self._is_pinned(source)):
                self._note(BLOCKING)
        elif name in INDEXING:
            self._note_index(args)
        else:
            assert not _mixed((args, kwargs)), f"{name} takes tensors of two devices"

    def _note_index(self, args: tuple) -> None:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
            self._note("an index of booleans")
        elif any(isinstance(i, list) for i in index) or _mixed(args):
            self._note("an index or a value on the other device")

    def _is_pinned(self, tensor: Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == memory for each in self._pinned)

    def _note(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if f.filename != __file__]
        self.waits.append(f"{what}: {own[-1].filename}:{own[-1].lineno}: {own[-1].line}")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, RemoteTensor) else value


def _remote(value: Any) -> Any:
    return RemoteTensor(value) if isinstance(value, Tensor) else value


def _mixed(values: object) -> bool:
    """Whether some tensors are on the GPU and others, of more than one number, on the host."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    remote = [isinstance(tensor, RemoteTensor) for tensor in tensors]
    return any(remote) and any(t.dim() and not r for t, r in zip(tensors, remote, strict=True))


def move_there(module: nn.Module) -> None:
    """Put the parameters and buffers of `module` on the GPU."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = RemoteTensor(tensor.detach())  # type: ignore[assignment]


class _Event:
    """An event of a stream on which everything has happened."""

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


@contextmanager
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuStandIn]:
    """Let this process believe that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with GpuStandIn() as stand_in:
        yield stand_in
