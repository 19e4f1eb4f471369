"""Free memory: that of the machine, or of a container with less; and what freed memory costs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch

from vdiff_kserve.models import can_pack
from vdiff_kserve.models.host_memory import (
    ALLOCATOR_VARIABLES,
    FILES,
    KERNEL_CACHES,
    bound_kernel_caches,
    free_host_memory,
    keep_freed_memory,
)

MIB = 1 << 20


def write_limits(folder: Path, version: int, limit: str) -> None:
    """The files of a container that uses 300 MiB, 100 of which could be given back."""
    most, used, reclaimable = FILES[2 - version]
    (folder / most).parent.mkdir(exist_ok=True)
    (folder / most).write_text(f"{limit}\n")
    (folder / used).write_text(f"{300 * MIB}\n")
    lines = f"anon {200 * MIB}\n{reclaimable} {100 * MIB}\nslab 7\n"
    (folder / most).parent.joinpath("memory.stat").write_text(lines)


@pytest.mark.parametrize("version", [2, 1])
def test_a_container_s_limit_counts(tmp_path: Path, version: int) -> None:
    write_limits(tmp_path, version, str(512 * MIB))
    assert free_host_memory(tmp_path) == 312 * MIB


def test_a_container_that_is_full_has_none_left(tmp_path: Path) -> None:
    write_limits(tmp_path, 2, str(128 * MIB))
    assert free_host_memory(tmp_path) == 0


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_without_a_limit_the_machine_s_memory_counts(tmp_path: Path, limit: str) -> None:
    write_limits(tmp_path, 2, limit)
    assert 0 < free_host_memory(tmp_path) <= psutil.virtual_memory().total
    assert free_host_memory(tmp_path) > 512 * MIB


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) > 0


def test_memory_that_a_thread_frees_is_not_cleared_anew() -> None:
    """Each round takes 4 MiB in two pieces: 1,024 pages that the kernel would clear one by one."""
    if not keep_freed_memory({}):
        pytest.skip("the C library is not glibc")
    rounds, faults = 50, []

    def take_and_free() -> None:
        for _ in range(rounds):
            torch.empty(MIB // 2).fill_(1.0) + 1.0
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    thread = Thread(target=take_and_free)
    thread.start()
    thread.join()
    assert faults[-1] - faults[0] < rounds * 1024 / 4


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_an_environment_that_sets_the_allocator_is_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1"})


SIZES = """
from pathlib import Path
import torch
from vdiff_kserve.models import bound_kernel_caches, pack_linear_layers

bound_kernel_caches()
layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False).bfloat16())
pack_linear_layers(layers)
x = torch.ones(1000, 64, dtype=torch.bfloat16)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


with torch.inference_mode():
    for tokens in range(1, 301):
        layers(x[:tokens])
    before = resident()
    for tokens in range(301, 901):
        layers(x[:tokens])
print(resident() - before)
"""


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="no oneDNN here")
def test_kernels_of_ever_new_sizes_do_not_grow_a_process_for_ever() -> None:
    """600 further numbers of tokens pass through a layer: 350 MiB, did oneDNN keep them all."""
    environment = {k: v for k, v in os.environ.items() if k not in KERNEL_CACHES}
    run = subprocess.run(
        [sys.executable, "-c", SIZES], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 100 * MIB


def test_an_environment_that_bounds_the_kernels_is_left_alone() -> None:
    environment = {KERNEL_CACHES[0]: "7"}
    bound_kernel_caches(environment)
    assert environment[KERNEL_CACHES[0]] == "7"
    assert int(environment[KERNEL_CACHES[1]]) < 1024
