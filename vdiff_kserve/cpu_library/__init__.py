"""The library of kernels for CPUs: compiled once from C++, kept, and loaded.

torch's operations on a CPU serve large tensors. The sources in this folder have what models of
small heads and few tokens need, for processors that multiply bfloat16 with AVX-512; there, a
compiler takes two seconds. Where there is none, or no such processor, callers do without. Nothing
here needs torch, so that a server can begin to compile while it still imports it.

    python -m vdiff_kserve.cpu_library FOLDER       compile into a folder, for an image for example
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
COMPILER = "g++"
"""Its OpenMP is that of torch's wheels: what clang compiles could not be loaded."""

OPTIONS = (
    *("-std=c++17", "-O3", "-march=x86-64-v4", "-mavx512bf16", "-fno-math-errno"),
    *("-fno-strict-aliasing", "-fopenmp", "-fPIC"),
)
COMPILE_LIMIT_S = 60


class CompileError(Exception):
    """The compiler refused a source, or took too long."""


FAILURES = (OSError, CompileError)
"""What keeps a library from being had."""

POINTER, NUMBER, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
FUNCTIONS = {
    "attend": (*(POINTER,) * 6, *(NUMBER,) * 4, POINTER, THREADS),
    "rms_norm": (*(POINTER,) * 5, *(NUMBER,) * 2, ctypes.c_float, THREADS),
    "rotate": (*(POINTER,) * 4, *(NUMBER,) * 4, THREADS),
    "likeliest": (POINTER, *(NUMBER,) * 2, *(POINTER,) * 3, *(NUMBER,) * 2, THREADS),
    "keep": (*(POINTER,) * 4, *(NUMBER,) * 2, THREADS),
    "linear": (*(POINTER,) * 3, NUMBER, THREADS),
    "gated": (*(POINTER,) * 4, NUMBER, THREADS),
    "run_layers": (POINTER, *(NUMBER,) * 3, POINTER, THREADS),
}
"""The library's functions and their arguments; none returns anything."""

_compiling = Lock()

logger = logging.getLogger("kserve.vdiff.engine")


def cpu_flags() -> set[str]:
    """Instruction-set flags of this machine's processor (empty where the kernel has none)."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8").splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def runs_here() -> bool:
    """Whether this processor has the library's instructions."""
    return sys.platform == "linux" and "avx512_bf16" in cpu_flags()


def begin() -> None:
    """Compile in the background what has not been compiled yet, if it is of use here."""

    def compile_quietly() -> None:
        with suppress(*FAILURES):  # `library` meets them again
            find_or_compile()

    if runs_here():
        Thread(target=compile_quietly, name="vdiff-compile", daemon=True).start()


def kernels_work(agrees: Callable[[], bool], otherwise: str) -> bool:
    """Whether kernels of the library can be used; where its processor is, the log says why not.

    Args:
        agrees: runs them and compares what they compute.
        otherwise: what happens if they are wrong.
    """
    if not is_available():
        return False
    if agrees():
        return True
    logger.warning("%s: on this CPU they compute wrong numbers.", otherwise)
    return False


@cache
def is_available() -> bool:
    """Whether there is a library for this processor; if there could be, the log says why not."""
    if not runs_here():
        return False
    try:
        library()
    except FAILURES as error:
        logger.warning(
            "Without kernels for this CPU, bfloat16 takes about twice as long: %s. "
            "They are compiled at the next start if there is g++ 11 or later, and a place for them "
            "in $XDG_CACHE_HOME or ~/.cache.",
            error,
        )
        return False
    return True


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Tensors as the library takes them; None stays none."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        CompileError: the compiler refused the source, or took too long.
    """
    loaded = ctypes.CDLL(str(find_or_compile()))
    for name, arguments in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def find_or_compile() -> Path:
    """The library beside its sources or in the user's cache, where it is put if it is in neither.

    It is compiled once in a process, with whatever outcome: each user would wait for a slow
    compiler again.

    Raises:
        OSError, CompileError: as `library`.
    """
    shipped = FOLDER / library_name()
    if shipped.exists():
        return shipped
    if _compiling.locked():
        logger.info("Waiting for kernels for this CPU to be compiled; later starts reuse them.")
    with _compiling:
        outcome = _outcome(cache_folder(), library_name())
    if isinstance(outcome, Path):
        return outcome
    raise outcome


@cache
def _outcome(folder: Path, _name: str) -> Path | OSError | CompileError:
    """What `compile_into` gave or raised when it was first asked for the library of this name."""
    try:
        return compile_into(folder)
    except FAILURES as error:
        return error


def library_name() -> str:
    """The file's name, which tells what it was made of."""
    made_of = b"".join(file.read_bytes() for file in (*sources(), *sorted(FOLDER.glob("*.h"))))
    made_of += " ".join(OPTIONS).encode()
    return f"cpu_library-{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def sources() -> list[Path]:
    """What is compiled."""
    return sorted(FOLDER.glob("*.cpp"))


def cache_folder() -> Path:
    """Where this user's compiled libraries stay.

    Raises:
        OSError: there is no such place, as for a user without a home.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(caches).expanduser() / "vdiff_kserve"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error} (set XDG_CACHE_HOME or HOME)") from error


def compile_into(folder: Path) -> Path:
    """The library in `folder`, compiled if it is not there.

    OpenMP is not linked: its functions are found in the library that torch has loaded, so that
    there is one set of threads.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        CompileError: the compiler refused the source, or took too long.
    """
    target = folder / library_name()
    if target.exists():
        return target
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise FileNotFoundError(f"there is no compiler {COMPILER}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        linked = Path(temporary) / "library.so"
        objects = [Path(temporary) / f"{source.stem}.o" for source in sources()]
        _run_all(
            [compiler, *OPTIONS, "-c", str(source), "-o", str(compiled)]
            for source, compiled in zip(sources(), objects, strict=True)
        )
        _run_all([[compiler, "-shared", *map(str, objects), "-o", str(linked)]])
        linked.replace(target)  # in one go, whoever else does the same
    return target


def _run_all(commands: Iterable[Sequence[str]]) -> None:
    """Run commands at the same time.

    Raises:
        OSError, CompileError: of the first that fails.
    """
    with ThreadPoolExecutor() as threads:
        list(threads.map(_run, commands))


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} takes more than {COMPILE_LIMIT_S} seconds") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or ["it said nothing"]
        told = next((line for line in lines if "error" in line), lines[-1])
        raise CompileError(f"{command[0]} failed with status {error.returncode}: {told}") from error
