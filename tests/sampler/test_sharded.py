"""Proposals from parts of the vocabulary are those from the whole."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from vdiff_kserve.sampler import (
    DecodingParams,
    Policy,
    Proposal,
    SpecialTokens,
    StepRows,
    can_propose_from_shards,
    propose,
    propose_from_shards,
)

VOCAB, SHARDS = 60, 3
SPECIAL = SpecialTokens(mask=59, eos=21, eot=40)
PARAMS = [
    DecodingParams(),
    DecodingParams(temperature=0.7, seed=5),
    DecodingParams(policy="threshold", logits_eos_inf=True),
    DecodingParams(confidence_eos_eot_inf=True, temperature=1.5, seed=9),
    DecodingParams(policy="random", confidence_eos_eot_inf=True),
]


def step_rows(params: list[DecodingParams], positions_each: int = 40) -> StepRows:
    host_row = torch.arange(len(params)).repeat_interleave(positions_each)
    row = host_row.to(TEST_DEVICE)
    position = torch.arange(positions_each, device=TEST_DEVICE).repeat(len(params))
    rows, ones = len(params), torch.full_like(position, -1)
    seeds, lengths = [p.seed for p in params], [positions_each] * rows
    return StepRows(row, position, ones, params, seeds, [1] * rows, lengths, host_row=host_row)


def on_shards(logits: Tensor, rows: StepRows) -> list[Proposal]:
    """Each shard on a thread; they meet where ranks would."""
    size = VOCAB // SHARDS
    told: list[Tensor | None] = [None] * SHARDS
    found: list[Proposal | None] = [None] * SHARDS
    barrier = Barrier(SHARDS, timeout=60)

    def run(rank: int) -> None:
        def gather(local: Tensor) -> Tensor:
            told[rank] = local
            barrier.wait()
            return torch.stack(told)

        own = logits[:, rank * size : (rank + 1) * size].clone()
        found[rank] = propose_from_shards(own, rank * size, rows, SPECIAL, gather)

    threads = [Thread(target=run, args=(rank,)) for rank in range(SHARDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_shards_agree(rows: StepRows, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows.row), VOCAB, generator=generator) * 4
    logits[:, SPECIAL.mask] += 8
    logits[::3, SPECIAL.eos] += 20
    logits = logits.to(TEST_DEVICE)
    expected = propose(logits.clone(), rows, SPECIAL)
    for proposal in on_shards(logits, rows):
        assert torch.equal(proposal.token, expected.token)
        torch.testing.assert_close(proposal.confidence, expected.confidence, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(proposal.score, expected.score, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_every_shard_proposes_what_the_whole_does(seed: int) -> None:
    assert_shards_agree(step_rows(PARAMS), seed)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("policy", get_args(Policy))
def test_no_policy_is_misjudged_from_parts_of_the_vocabulary(
    policy: Policy, temperature: float
) -> None:
    rows = step_rows([DecodingParams(policy, temperature=temperature, seed=3)])
    if can_propose_from_shards(rows):
        assert_shards_agree(rows, seed=0)


@pytest.mark.parametrize(
    "params",
    [
        DecodingParams(policy="entropy"),
        DecodingParams(temperature=1.0, top_p=0.9),
        DecodingParams(temperature=1.0, policy="maskgit_plus"),
        DecodingParams(top_logprobs=0),
    ],
)
def test_rows_that_need_whole_logits_are_known(params: DecodingParams) -> None:
    assert can_propose_from_shards(step_rows(PARAMS))
    assert not can_propose_from_shards(step_rows([*PARAMS, params]))
