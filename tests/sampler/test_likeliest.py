"""The kernel that finds the likeliest tokens proposes what torch's operations propose."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.device import needs_cpu_library
from vdiff_kserve.sampler import DecodingParams, Policy, SpecialTokens, StepRows, likeliest, propose

needs_kernel = needs_cpu_library
SPECIAL = SpecialTokens(mask=48, eos=21, eot=40)
EACH = 30


def step_rows(params: list[DecodingParams]) -> StepRows:
    row = torch.arange(len(params)).repeat_interleave(EACH)
    position = torch.arange(EACH).repeat(len(params))
    seeds, lengths = [p.seed for p in params], [EACH] * len(params)
    written = torch.full_like(position, -1)
    return StepRows(row, position, written, params, seeds, [1] * len(params), lengths)


def random_logits(rows: int, vocab: int) -> Tensor:
    """With many equal ones, and the mask and end tokens often the largest."""
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab) * 3).round()
    logits[:, SPECIAL.mask] += 4
    logits[:, SPECIAL.eos] += 4
    return logits.bfloat16()


@needs_kernel
@pytest.mark.parametrize("vocab", [49, 64, 2304])
@pytest.mark.parametrize("mask", [SPECIAL.mask, None])
def test_proposals_are_those_of_torch(vocab: int, mask: int | None) -> None:
    rows = step_rows([DecodingParams(), DecodingParams(policy="threshold", logits_eos_inf=True)])
    special = SpecialTokens(mask, SPECIAL.eos, SPECIAL.eot)
    logits = random_logits(2 * EACH, vocab)
    plain = propose(logits.float(), rows, special)
    fast = propose(logits, rows, special)
    assert fast.token.equal(plain.token), "the first of equals is taken"
    torch.testing.assert_close(fast.confidence, plain.confidence, rtol=2e-4, atol=0)
    torch.testing.assert_close(fast.score, plain.score, rtol=2e-4, atol=0)
    assert (fast.token[EACH:] != SPECIAL.eos).all()
    assert (fast.token[:EACH] == SPECIAL.eos).any()


@needs_kernel
@pytest.mark.parametrize(
    "params",
    [
        *(DecodingParams(policy=policy) for policy in get_args(Policy)),
        DecodingParams(temperature=0.7),
        DecodingParams(confidence_eos_eot_inf=True),
    ],
)
def test_rows_that_need_more_take_torch_together_with_all_others(params: DecodingParams) -> None:
    rows = step_rows([DecodingParams(logits_eos_inf=True), params])
    logits = random_logits(2 * EACH, 49)
    plain, fast = propose(logits.float(), rows, SPECIAL), propose(logits, rows, SPECIAL)
    assert fast.token.equal(plain.token)
    torch.testing.assert_close(fast.score, plain.score, rtol=2e-4, atol=0)


@needs_kernel
def test_what_is_no_number_is_least_sure() -> None:
    logits = torch.zeros((3, 50)).bfloat16()
    logits[1] = -torch.inf
    logits[2, 7] = torch.nan
    rows = StepRows(
        torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.full((3,), -1),
        [DecodingParams()], [0], [1], [3],
    )  # fmt: skip
    proposal = propose(logits, rows, SPECIAL)
    assert proposal.confidence.tolist() == pytest.approx([1 / 50, 0, 0])
    assert proposal.score.tolist() == pytest.approx([1 / 50, -1e9, -1e9])


@needs_kernel
def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert likeliest.agrees()
    find = likeliest.find
    monkeypatch.setattr(likeliest, "find", lambda logits, *rest: find(logits.flip(0), *rest))
    assert not likeliest.agrees()
