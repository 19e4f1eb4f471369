"""A step asks a device for nothing before its one result: all of it runs on the meta device, which
has no numbers, so that whatever depends on one fails."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from vdiff_kserve.sampler import (
    DecodingParams,
    Policy,
    SpecialTokens,
    StepRows,
    propose,
    select,
)

SPECIAL = SpecialTokens(mask=11, eos=10, eot=9)
POLICIES = [policy for policy in get_args(Policy) if policy != "credit"]


def rows_without_numbers(params: list[DecodingParams], each: int = 4) -> StepRows:
    row = torch.arange(len(params)).repeat_interleave(each)
    nowhere = torch.empty(len(row), dtype=torch.int64, device="meta")
    count = len(params)
    seeds, quotas, lengths = [0] * count, [1] * count, [9] * count
    return StepRows(nowhere, nowhere, nowhere, params, seeds, quotas, lengths, host_row=row)


def step(params: list[DecodingParams]) -> torch.Tensor:
    rows = rows_without_numbers(params)
    logits = torch.empty(len(rows.row), 12, dtype=torch.bfloat16, device="meta")
    halves = [slice(0, 3), slice(3, None)]
    for half in halves:
        propose(logits[half], rows.part(half), SPECIAL)
    return select(propose(logits, rows, SPECIAL), rows)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1}],
    ids=["greedy", "sampled", "filtered"],
)
def test_a_step_waits_for_no_number(policy: Policy, sampling: dict[str, float]) -> None:
    params = DecodingParams(policy=policy, **sampling)
    others = [DecodingParams(), replace(params, logits_eos_inf=True, seed=3)]
    assert step([params, *others]).shape == (12,)
