"""What each rank of a shared mixture reads and holds; the ranks' parts add up to the whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.golden import GOLDEN_DIR
from tests.models.folders import random_tensors, write_single
from tests.models.plain_kernels import use_plain_kernels
from vdiff_kserve.models import CheckpointError, Decoder, ForwardBatch, load_decoder, loader

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def config(family: str, **changes: Any) -> dict[str, Any]:
    published = next((GOLDEN_DIR / family).rglob("config.json"))
    return json.loads(published.read_text(encoding="utf-8")) | changes


@contextmanager
def mesh_of(rank: int, size: int) -> Iterator[DeviceMesh]:
    """One of several ranks, of which the others are not there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


def of_rank(folder: Path, rank: int, size: int, dtype: torch.dtype) -> Decoder:
    with mesh_of(rank, size) as mesh:
        return load_decoder(folder, dtype=dtype, mesh=mesh)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes", "size"),
    [
        ("llada_moe", {}, 2),
        ("llada2", {}, 2),
        ("llada_moe", {"num_experts": 7}, 2),  # by width
    ],
)
@torch.inference_mode()
def test_what_the_ranks_experts_make_adds_up(
    family: str, changes: dict[str, Any], size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    fields = config(family, **changes)
    write_single(tmp_path, fields, random_tensors(fields))
    whole, _ = load_decoder(tmp_path, dtype=dtype)
    ranks = [of_rank(tmp_path, rank, size, dtype) for rank in range(size)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((40, whole.config.hidden_size), generator=generator).to(dtype)
    layer = whole.layers[-1].mlp
    chosen, weights = layer.router(x)
    parts = [rank.layers[-1].mlp.experts(x, chosen, weights).float() for rank in ranks]
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(
        sum(parts), layer.experts(x, chosen, weights).float(), atol=tolerance, rtol=tolerance
    )
    held = {rank.layers[-1].mlp.experts.num_held for rank in ranks}
    assert held == {7 if changes else 4}


@pytest.mark.parametrize("family", ["llada_moe", "llada2"])
def test_a_rank_reads_its_own_experts_only(family: str, tmp_path: Path) -> None:
    """Those of others may be whatever they like: what is read must be finite."""
    fields = config(family)
    tensors = random_tensors(fields)
    for name, tensor in tensors.items():
        if (found := EXPERT.search(name)) and int(found[1]) >= 4:
            tensor.fill_(torch.nan)
    write_single(tmp_path, fields, tensors)
    of_rank(tmp_path, 0, 2, torch.float32)
    with pytest.raises(CheckpointError, match="not finite"):
        of_rank(tmp_path, 1, 2, torch.float32)


def test_experts_that_can_be_shared_in_no_way_are_named(tmp_path: Path) -> None:
    fields = config("llada_moe", num_experts=7, expert_intermediate_size=25)
    write_single(tmp_path, fields, random_tensors(fields))
    with pytest.raises(CheckpointError, match=r"neither .* num_experts = 7 nor .* = 25"):
        of_rank(tmp_path, 0, 2, torch.float32)


def test_a_size_that_no_number_of_ranks_divides_is_named(tmp_path: Path) -> None:
    fields = config("llada")
    write_single(tmp_path, fields, random_tensors(fields))
    with pytest.raises(CheckpointError, match=r"--tensor_parallel_size 3 does not divide .*heads"):
        of_rank(tmp_path, 0, 3, torch.float32)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2"])
@torch.inference_mode()
def test_a_rank_joins_its_own_part_of_layers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; what the other rank would add is left out of both."""
    fields = config(family)
    write_single(tmp_path, fields, random_tensors(fields))
    monkeypatch.setattr(loader, "can_pack", lambda *_: False)
    states = []
    for is_joined in (False, True):
        monkeypatch.setattr(loader, "gains_from_joining", lambda _, joins=is_joined: joins)
        with mesh_of(1, 2) as mesh:
            rank, _ = load_decoder(tmp_path, mesh=mesh)
            assert rank.layers[0].attention.is_joined == is_joined
            states.append(rank(ForwardBatch.pack([torch.arange(30, 41)])))
        use_plain_kernels(monkeypatch)
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-5)
