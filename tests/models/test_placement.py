"""Weights that wait elsewhere: where they are kept, and that the answers are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden import GOLDEN_DIR
from tests.models.folders import CONFIG, tensors_of, write_single
from vdiff_kserve.models import CheckpointError, Decoder, ForwardBatch, load_decoder
from vdiff_kserve.models.placement import Memory, compute_on, place_modules

SIZES = {"n_layers": 6, "d_model": 64, "mlp_hidden_size": 128}
CPU, META = torch.device("cpu"), torch.device("meta")


@torch.inference_mode()
def logits_of(decoder: Decoder) -> Tensor:
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    return decoder.logits(decoder(ForwardBatch.dense(ids)))


def plain(tmp_path: Path, **changes: object) -> Decoder:
    """A decoder whose layers are not packed."""
    config = CONFIG | SIZES | changes
    return load_decoder(write_single(tmp_path, config, tensors_of(config)), dtype=torch.float16)[0]


def homes(decoder: Decoder, spread: str, memory: Memory) -> list[str]:
    """Devices of embedding, blocks, norm and head, in order."""
    placed = place_modules(decoder, spread, torch.float16, memory)
    order = ["embed_tokens", *(f"layers.{i}" for i in range(6)), "norm", "lm_head"]
    assert sorted(placed) == sorted(order)
    return [str(placed[name]) for name in order]


def block_bytes(decoder: Decoder) -> int:
    return sum(p.numel() for p in decoder.layers[0].parameters()) * 2


def test_everything_is_on_the_first_gpu_when_it_fits(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    assert set(homes(decoder, "auto", {0: 10**9, 1: 10**9, "cpu": 10**9})) == {"cuda:0"}


def test_auto_fills_the_gpus_in_order_and_then_the_host(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    room = 3 * block_bytes(decoder) + decoder.embed_tokens.weight.nbytes
    found = homes(decoder, "auto", {0: room, 1: room, "cpu": 10**9})
    assert found == sorted(found, key=["cuda:0", "cuda:1", "cpu"].index)
    assert set(found) == {"cuda:0", "cuda:1", "cpu"}
    assert found[0] == "cuda:0"


def test_balanced_gives_every_gpu_about_as_much(tmp_path: Path) -> None:
    found = homes(plain(tmp_path), "balanced", {0: 10**9, 1: 10**9, "cpu": 10**9})
    blocks = found[1:7]
    assert "cpu" not in found
    assert 2 <= blocks.count("cuda:0") <= 4


def test_balanced_needs_gpus(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    for memory in ({"cpu": 10**9}, {0: 10**9, "cpu": 10**9}):
        with pytest.raises(CheckpointError, match="balanced needs two GPUs or more; there are"):
            place_modules(decoder, "balanced", torch.float16, memory)


def test_what_fits_nowhere_is_refused_with_both_sizes(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    with pytest.raises(CheckpointError, match=r"need \d+\.\d GB, GPUs and host have room for 0\.0"):
        place_modules(decoder, "auto", torch.float16, {0: 50_000, "cpu": 60_000})


def test_blocks_that_all_wait_elsewhere_are_placed_one_by_one(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    room = decoder.embed_tokens.weight.nbytes + block_bytes(decoder) * 3 // 2
    found = homes(decoder, "auto", {0: room, "cpu": 10**9})
    assert found == ["cuda:0", *(["cpu"] * 8)]


def test_a_first_gpu_without_room_for_a_block_is_refused(tmp_path: Path) -> None:
    decoder = plain(tmp_path)
    with pytest.raises(CheckpointError, match="no room for the embedding and a block"):
        place_modules(decoder, "auto", torch.float16, {0: 10_000, "cpu": 10**9})


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_wait_elsewhere_give_the_same_answers(tmp_path: Path, tied: bool) -> None:
    decoder = plain(tmp_path, weight_tying=tied)
    expected = logits_of(decoder)
    waiting = ["layers.1", "layers.4", "norm", *([] if tied else ["lm_head"])]
    compute_on(decoder, dict.fromkeys(waiting, torch.device("cuda:1")), CPU)
    for _ in range(2):
        assert torch.equal(logits_of(decoder), expected)
        for name in waiting:
            assert {p.device for p in decoder.get_submodule(name).parameters()} == {META}
    assert decoder.layers[0].mlp.up_proj.weight.device == CPU
    assert decoder.device == CPU


def test_experts_can_wait_too() -> None:
    decoder, _ = load_decoder(GOLDEN_DIR / "llada_moe", dtype=torch.float16)
    expected = logits_of(decoder)
    compute_on(decoder, {"layers.0": torch.device("cuda:1")}, CPU)
    assert torch.equal(logits_of(decoder), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_everything_is_in_host_memory(tmp_path: Path) -> None:
    config = CONFIG | SIZES
    folder = write_single(tmp_path, config, tensors_of(config))
    spread, whole = (load_decoder(folder, spread=each)[0] for each in ("auto", None))
    assert torch.equal(logits_of(spread), logits_of(whole))
    assert not any(p.is_meta for p in spread.parameters())
    with pytest.raises(CheckpointError, match="there are 0"):
        load_decoder(folder, spread="balanced")
