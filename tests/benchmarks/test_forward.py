"""The forward benchmark compares what computes the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import forward
from vdiff_kserve.models.moe import MoEConfig

SMALL = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.mark.parametrize("architecture", forward.STOCK)
def test_a_family_is_timed_against_its_equal_in_transformers(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an error when the logits differ."""
    monkeypatch.setattr(forward, "SIZES", forward.SIZES | SMALL)
    ours, theirs = forward.time_family(architecture, torch.float32, tokens=37, rounds=1)
    assert ours > 0
    assert theirs > 0


def test_a_family_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = forward.STOCK["SDARForCausalLM"]
    causal = {"SDARForCausalLM": forward.replace(stock, block=1)}
    monkeypatch.setattr(forward, "STOCK", causal)
    monkeypatch.setattr(forward, "SIZES", forward.SIZES | SMALL)
    with pytest.raises(RuntimeError, match="the logits differ"):
        forward.time_family("SDARForCausalLM", torch.float32, tokens=37, rounds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_timed_against_loops(dtype: torch.dtype) -> None:
    seconds = forward.time_experts(MoEConfig(8, 2, 16), dtype, rounds=1)
    assert seconds.keys() == {"ours", "own", "all"}
