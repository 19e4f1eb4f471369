"""APD's check: what is accepted, from which distribution, and how often."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.sampler.markov import chi_square, chi_square_limit
from vdiff_kserve.sampler import DecodingParams, SpecialTokens, StepRows, propose, verify
from vdiff_kserve.sampler.apd import leading_run, mixture_logits, target_tokens

TOKENS = 8
SPECIAL = SpecialTokens(mask=8, eos=7, eot=None)
POSITIONS = 24_000


def distributions() -> tuple[Tensor, Tensor]:
    """Logits of one diffusion model [9, the mask included] and one causal model [8], on
    `TEST_DEVICE`."""
    generator = torch.Generator().manual_seed(4)
    diffusion = torch.randn(TOKENS + 1, generator=generator)
    diffusion[SPECIAL.mask] = -torch.inf
    auxiliary = torch.randn(TOKENS, generator=generator)
    return diffusion.to(TEST_DEVICE), auxiliary.to(TEST_DEVICE)


DIFFUSION, AUXILIARY = distributions()


def pairs_of_positions(**decoding: Any) -> StepRows:
    """Rows of two positions each; the second ones are where acceptance means something."""
    count = POSITIONS
    row = torch.arange(count).repeat_interleave(2)
    return StepRows(
        row=row.to(TEST_DEVICE),
        position=torch.arange(2 * count, device=TEST_DEVICE) % 100,
        written=torch.full((2 * count,), -1, device=TEST_DEVICE),
        params=[DecodingParams("apd", **decoding)] * count,
        seeds=range(count),
        quotas=[2] * count,
        lengths=[100] * count,
        host_row=row,
    )


def draft_of(rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
    """Drafted tokens, and the two models' logits at every position."""
    count = len(rows.row)
    diffusion = DIFFUSION.expand(count, -1)
    draft = propose(diffusion.clone(), rows, SPECIAL).token
    return draft, diffusion, AUXILIARY.expand(count, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.7, 1.0])
def test_target_sample_follows_the_product_of_both_models(
    weight: float, temperature: float
) -> None:
    rows = pairs_of_positions(temperature=temperature, apd_mixture_weight=weight)
    _, diffusion, auxiliary = draft_of(rows)
    samples = target_tokens(mixture_logits(diffusion, auxiliary, rows), rows)
    p_diffusion = (DIFFUSION[:TOKENS].double() / temperature).softmax(-1)
    p_auxiliary = (AUXILIARY.double() / temperature).softmax(-1)
    target = p_diffusion**weight * p_auxiliary ** (1 - weight)
    counts = torch.bincount(samples, minlength=TOKENS).double()
    assert chi_square(counts[None], target[None] / target.sum()) < chi_square_limit(TOKENS - 1)


def test_target_is_of_the_filtered_distribution_that_the_draft_came_from() -> None:
    rows = pairs_of_positions(temperature=1.0, top_k=3, apd_mixture_weight=0.7)
    draft, diffusion, auxiliary = draft_of(rows)
    samples = target_tokens(mixture_logits(diffusion, auxiliary, rows), rows)
    possible = set(DIFFUSION.topk(3).indices.tolist())
    assert set(samples.tolist()) == set(draft.tolist()) == possible


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_accepted_exactly_where_draft_and_target_sample_agree(weight: float) -> None:
    rows = pairs_of_positions(temperature=1.0, apd_mixture_weight=weight)
    draft, diffusion, auxiliary = draft_of(rows)
    samples = target_tokens(mixture_logits(diffusion, auxiliary, rows), rows)
    accepted = verify(draft, diffusion, auxiliary, rows)
    assert accepted[0::2].all()
    assert torch.equal(accepted[1::2], (samples == draft)[1::2])
    if weight == 1.0:
        assert accepted.all()


def test_acceptance_rate_is_that_of_one_shared_gumbel_noise() -> None:
    """P(agree) = sum over x of 1 / sum over y of max(p(y)/p(x), q(y)/q(x)) for one shared noise;
    for separate noises it is only sum of p(x) q(x)."""
    rows = pairs_of_positions(temperature=1.0, apd_mixture_weight=0.5)
    draft, diffusion, auxiliary = draft_of(rows)
    p = DIFFUSION[:TOKENS].double().softmax(-1)
    q = (0.5 * DIFFUSION[:TOKENS].double() + 0.5 * AUXILIARY.double()).softmax(-1)
    shared = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum())
    separate = float((p * q).sum())
    rate = float(verify(draft, diffusion, auxiliary, rows)[1::2].double().mean())
    error = (shared * (1 - shared) / POSITIONS) ** 0.5
    assert rate == pytest.approx(shared, abs=4 * error)
    assert rate > separate + 20 * error


def test_threshold_asks_for_probability_under_the_target() -> None:
    rows = pairs_of_positions(temperature=1.0, apd_mixture_weight=0.5, apd_threshold=0.15)
    draft, diffusion, auxiliary = draft_of(rows)
    probability = (0.5 * DIFFUSION[:TOKENS] + 0.5 * AUXILIARY).double().softmax(-1)
    accepted = verify(draft, diffusion, auxiliary, rows)
    samples = target_tokens(mixture_logits(diffusion, auxiliary, rows), rows)
    likely = probability[draft] >= 0.15
    assert accepted[0::2].all()
    assert torch.equal(accepted[1::2], ((samples == draft) & likely)[1::2])
    assert not likely.all()


def test_greedy_check_compares_the_most_likely_tokens() -> None:
    rows = pairs_of_positions(apd_mixture_weight=0.5)
    _, diffusion, auxiliary = draft_of(rows)
    best = int((0.5 * DIFFUSION[:TOKENS] + 0.5 * AUXILIARY).argmax())
    for token in range(TOKENS):
        draft = torch.full_like(rows.row, token)
        accepted = verify(draft, diffusion, auxiliary, rows)
        assert accepted[0::2].all()
        assert accepted[1::2].all() if token == best else not accepted[1::2].any()


def test_token_outside_the_smaller_vocabulary_is_accepted_first_only() -> None:
    rows = pairs_of_positions(apd_mixture_weight=0.5)
    diffusion = torch.zeros(len(rows.row), TOKENS + 2, device=TEST_DEVICE)
    diffusion[:, -1] = 5
    draft = torch.full_like(rows.row, TOKENS + 1)
    auxiliary = AUXILIARY.expand(len(rows.row), -1)
    accepted = verify(draft, diffusion, auxiliary, rows)
    assert accepted[0::2].all()
    assert not accepted[1::2].any()


def test_impossible_tokens_of_either_model_do_not_spoil_the_other_ones() -> None:
    """Their weight may be 0, and 0 times minus infinity is no number."""
    diffusion, auxiliary = DIFFUSION.clone()[None], AUXILIARY.clone()[None]
    diffusion[0, 2] = auxiliary[0, 3] = -torch.inf
    for weight in (0.0, 0.5, 1.0):
        params = DecodingParams("apd", apd_mixture_weight=weight)
        rows = one_position(params)
        mixture = mixture_logits(diffusion, auxiliary, rows)
        assert not mixture.isnan().any()
        assert mixture.softmax(-1).isfinite().all()


def one_position(params: DecodingParams) -> StepRows:
    zero = torch.zeros(1, dtype=torch.int64, device=TEST_DEVICE)
    return StepRows(zero, zero, zero - 1, [params], [0], [1], [4])


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_leading_run_stops_at_each_rows_first_rejection(rows: list[list[bool]]) -> None:
    accepted = torch.tensor([yes for row in rows for yes in row], device=TEST_DEVICE)
    numbers = torch.tensor([i for i, row in enumerate(rows) for _ in row], device=TEST_DEVICE)
    expected = [all(row[: i + 1]) for row in rows for i in range(len(row))]
    assert leading_run(accepted, numbers).tolist() == expected
