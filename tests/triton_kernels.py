"""Kernels of Triton on a machine without a GPU: interpreted, or compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program may use of a multiprocessor's memory, by compute capability."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(module: str) -> None:
    """Run a module on the CPU, its kernels interpreted: Triton is told before it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "VDIFF_TEST_DEVICE": "cpu"}
    subprocess.run([sys.executable, "-m", module], env=environment, cwd=ROOT, check=True)


def let_loops_begin_at_numbers_from_memory() -> None:
    """Triton's interpreter keeps them in arrays that NumPy 2.4 makes no number of."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_more


def compile_for_gpus(
    kernel: Any,
    types: dict[str, str],
    sizes: Mapping[str, float],
    capabilities: Sequence[int] = (80, 90, 100),
    **options: int,
) -> None:
    """Compile a kernel for several generations of GPUs, of which none is needed for that.

    Args:
        types: of arguments, where they are no int32.
        sizes: its constants.
        capabilities: of the GPUs, some of `SHARED_BYTES`.
        options: how it is launched, `num_warps` and `num_stages`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(sizes, "constexpr")
    signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
    constants = {(kernel.arg_names.index(size),): value for size, value in sizes.items()}
    # As torch gives memory out; what is read ahead takes the most of a multiprocessor's.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("stride", "size"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    for capability in capabilities:
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES[capability]
