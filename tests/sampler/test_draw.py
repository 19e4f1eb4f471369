"""The kernel that draws tokens: that it draws those of the plain operations, in Triton's
interpreter, that compilers for GPUs take it, and when it is used. On a GPU,
`tests/models/test_gpu.py` runs it."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sampler.rows import VOCAB, propose_rows, row_of
from tests.triton_kernels import compile_for_gpus, needs_triton, run_interpreted
from vdiff_kserve.sampler import DecodingParams, draw
from vdiff_kserve.sampler.noise import gumbel


@needs_triton
def test_the_kernel_draws_what_the_plain_operations_draw() -> None:
    run_interpreted("tests.sampler.interpreted_draw")


@needs_triton
def test_compilers_for_gpus_take_the_kernel() -> None:
    from vdiff_kserve.sampler.draw_kernel import draw_kernel

    types = {"logits": "*fp32", "temperature": "*fp64", "best": "*fp64"}
    types |= dict.fromkeys(("places", "key", "token"), "*i64")
    compile_for_gpus(draw_kernel, types, {"BLOCK": draw.BLOCK})


@pytest.mark.parametrize(
    ("decoding", "draws"),
    [
        ({"temperature": 0.7}, True),
        ({}, False),
        ({"temperature": 0.7, "top_k": 3}, False),
        ({"temperature": 0.7, "filtered_confidence": True}, False),
    ],
    ids=str,
)
def test_the_kernel_draws_for_rows_without_filters(
    decoding: dict[str, Any], draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a row that takes the likeliest tokens; with the plain operations in its place."""
    generator = torch.Generator().manual_seed(0)
    params = DecodingParams(seed=5, **decoding)
    rows = [row_of(torch.randn((3, VOCAB), generator=generator), DecodingParams())]
    rows.append(row_of(torch.randn((4, VOCAB), generator=generator), params))
    expected, _ = propose_rows(rows)
    drawn: list[Tensor] = []

    def in_place_of_it(
        logits: Tensor,
        places: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        mask_token: int,
    ) -> Tensor:
        scores = logits[places].double() / temperature[:, None]
        scores += gumbel(seeds, positions, VOCAB)
        scores[:, mask_token] = -torch.inf
        drawn.append(places)
        return scores.argmax(dim=-1)

    monkeypatch.setattr(draw, "usable", lambda _: True)
    monkeypatch.setattr(draw, "draw", in_place_of_it)
    proposal, _ = propose_rows(rows)
    assert [places.tolist() for places in drawn] == ([[3, 4, 5, 6]] if draws else [])
    assert torch.equal(proposal.token, expected.token)
    assert torch.equal(proposal.confidence, expected.confidence)


@pytest.mark.parametrize("fault", [RuntimeError("Failed to find C compiler"), None])
def test_tokens_are_drawn_without_a_kernel_that_fails(
    fault: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def agrees(_: torch.device) -> bool:
        if fault is not None:
            raise fault
        return False

    monkeypatch.setattr(draw, "agrees", agrees)
    with caplog.at_level(logging.WARNING):
        assert not draw.works.__wrapped__(torch.device("cpu"))
    assert ("C compiler" if fault else "wrong numbers") in caplog.text


def test_a_cpu_draws_without_a_kernel() -> None:
    assert not draw.usable(torch.zeros(2, VOCAB))
