"""Kernels of Triton on a machine without a GPU: interpreted, or compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90, 100)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(module: str) -> None:
    """Run a module whose kernels Triton interprets, which it must know before it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", module], env=environment, cwd=ROOT, check=True)


def compile_for_gpus(kernel: Any, types: dict[str, str], sizes: dict[str, int]) -> None:
    """Compile a kernel for several generations of GPUs, of which none is needed for that.

    Args:
        types: of arguments, where they are no int32.
        sizes: its constants.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(sizes, "constexpr")
    constants = {(kernel.arg_names.index(size),): value for size, value in sizes.items()}
    source = ASTSource(kernel, signature, constants)
    for capability in CAPABILITIES:
        assert triton.compile(source, GPUTarget("cuda", capability, 32)).asm["cubin"]
