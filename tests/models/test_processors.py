"""Processors that a process may use, by the machine and by its container, and torch's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vdiff_kserve.models.processors import fit_threads, usable_processors


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def write_limit(folder: Path, version: int, quota: str) -> None:
    if version == 2:
        (folder / "cpu.max").write_text(f"{'max' if quota == '-1' else quota} 100000\n")
        return
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu" / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize(("quota", "processors"), [("25000", 1), ("100000", 1), ("100001", 2)])
def test_a_container_s_limit_counts_rounded_up(
    tmp_path: Path, version: int, quota: str, processors: int
) -> None:
    write_limit(tmp_path, version, quota)
    assert usable_processors(tmp_path) == min(processors, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize("quota", ["-1", "999900000"])
def test_else_the_processors_that_it_may_run_on(tmp_path: Path, version: int, quota: str) -> None:
    write_limit(tmp_path, version, quota)
    every = os.sched_getaffinity(0)
    assert usable_processors(tmp_path) == len(every)
    os.sched_setaffinity(0, {min(every)})
    try:
        assert usable_processors(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, every)


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert usable_processors(tmp_path) == len(os.sched_getaffinity(0))


def test_threads_are_no_more_than_processors(tmp_path: Path) -> None:
    write_limit(tmp_path, 2, "50000")
    fit_threads({}, tmp_path)
    assert torch.get_num_threads() == 1


def test_the_environment_s_number_stands(tmp_path: Path) -> None:
    write_limit(tmp_path, 2, "50000")
    fit_threads({"OMP_NUM_THREADS": "4"}, tmp_path)
    assert torch.get_num_threads() == 4
    fit_threads({"OMP_NUM_THREADS": "4"}, tmp_path, processes=2)
    assert torch.get_num_threads() == 2


def test_threads_do_not_become_more(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    fit_threads({}, tmp_path)
    assert torch.get_num_threads() == 1
