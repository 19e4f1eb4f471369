"""Candidate tokens and their confidence; the filters; evidence over steps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.sampler.markov import chi_square, chi_square_limit
from tests.sampler.rows import SPECIAL, VOCAB, proposal_of, propose_rows, row_of, step_rows
from vdiff_kserve.sampler import (
    DecodingParams,
    Evidence,
    Policy,
    accumulate,
    fuse,
    guide,
    select,
)
from vdiff_kserve.sampler.step import filter_tokens


def random_logits(seed: int, positions: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, VOCAB, generator=generator) * scale


def kept_by_loop(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens that remain, one rule after the other: min_p, top_k, top_p."""
    probability = torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()
    kept = [i for i, p in enumerate(probability) if p >= min_p * max(probability)]
    kept.sort(key=lambda i: (-logits[i], i))
    if top_k:
        kept = kept[:top_k]
    total, reached, nucleus = sum(probability[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and reached >= top_p * total:
            break
        nucleus.append(i)
        reached += probability[i]
    return set(nucleus)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rules=st.lists(
        st.tuples(
            st.integers(0, VOCAB + 2),
            st.sampled_from([1.0, 0.95, 0.7, 0.31, 0.01]),
            st.sampled_from([0.0, 0.03, 0.4, 1.0]),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_filter_keeps_what_a_plain_loop_keeps(
    seed: int, rules: list[tuple[int, float, float]]
) -> None:
    logits = random_logits(seed, len(rules)).double()
    top_k, top_p, min_p = (torch.tensor(values) for values in zip(*rules, strict=True))
    rule_by_rule = (each.to(TEST_DEVICE) for each in (top_k, top_p.double(), min_p.double()))
    filtered = filter_tokens(logits.to(TEST_DEVICE), *rule_by_rule).cpu()
    for before, after, rule in zip(logits, filtered, rules, strict=True):
        kept = set((after > -torch.inf).nonzero().flatten().tolist())
        assert kept == kept_by_loop(before.tolist(), *rule)
        assert torch.equal(after[list(kept)], before[list(kept)])


def test_filter_off_changes_nothing() -> None:
    logits = random_logits(1, 3)
    off = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3)
    assert torch.equal(filter_tokens(logits, *off), logits)


def test_greedy_candidate_and_its_confidence() -> None:
    logits = random_logits(2, 50)
    logits[:, SPECIAL.mask] += 3
    proposal = proposal_of(row_of(logits, DecodingParams()))
    without_mask = logits.clone()
    without_mask[:, SPECIAL.mask] = -torch.inf
    assert torch.equal(proposal.token, without_mask.argmax(-1))
    expected = logits.softmax(-1).gather(-1, proposal.token[:, None]).squeeze(-1)
    torch.testing.assert_close(proposal.confidence.float(), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_tempered_softmax(temperature: float) -> None:
    """And its confidence stays that of the raw logits (LLaDA)."""
    logits = random_logits(3, 1, scale=1.0)
    rows = [
        row_of(logits, DecodingParams(temperature=temperature, seed=seed), first=1 + seed % 50)
        for seed in range(8000)
    ]
    proposal = proposal_of(*rows)
    expected = logits[0].double() / temperature
    expected[SPECIAL.mask] = -torch.inf
    counts = torch.bincount(proposal.token, minlength=VOCAB)[: VOCAB - 1].double()
    limit = chi_square_limit(VOCAB - 2)
    assert chi_square(counts[None], expected.softmax(-1)[None, : VOCAB - 1]) < limit
    assert counts[SPECIAL.eos] > 0
    confidence = logits[0].softmax(-1)[proposal.token].double()
    torch.testing.assert_close(proposal.confidence, confidence)


def test_filtered_sample_follows_the_filtered_softmax_and_dream_is_sure_of_that() -> None:
    logits = random_logits(4, 1, scale=1.0)
    params = [
        DecodingParams("maskgit_plus", temperature=0.8, top_k=4, top_p=0.9, seed=seed)
        for seed in range(6000)
    ]
    proposal = proposal_of(*(row_of(logits, p) for p in params))
    tempered = logits[0].double() / 0.8
    tempered[SPECIAL.mask] = -torch.inf
    kept = sorted(kept_by_loop(tempered.tolist(), 4, 0.9, 0.0))
    counts = torch.bincount(proposal.token, minlength=VOCAB).double()
    assert counts[kept].sum() == 6000
    expected = tempered[kept].softmax(-1)
    assert chi_square(counts[kept][None], expected[None]) < chi_square_limit(len(kept) - 1)
    sure = expected[torch.searchsorted(torch.tensor(kept), proposal.token)]
    torch.testing.assert_close(proposal.confidence, sure, atol=1e-6, rtol=1e-5)


def test_greedy_row_is_not_disturbed_by_a_sampling_neighbour() -> None:
    logits = random_logits(5, 4)
    greedy, hot = DecodingParams(), DecodingParams(temperature=1.0, top_k=3, seed=3)
    alone = proposal_of(row_of(logits, greedy))
    both = proposal_of(row_of(logits, greedy), row_of(logits, hot))
    assert torch.equal(both.token[:4], alone.token)
    assert torch.equal(both.confidence[:4], alone.confidence)


def test_neighbouring_positions_and_seeds_draw_on_their_own() -> None:
    flat = torch.zeros(64, VOCAB)
    rows = [row_of(flat, DecodingParams(temperature=1.0, seed=seed)) for seed in range(60)]
    tokens = proposal_of(*rows).token.reshape(60, 64)
    for left, right in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        pairs = torch.bincount((left * VOCAB + right).flatten(), minlength=VOCAB**2).double()
        pairs = pairs.reshape(VOCAB, VOCAB)[: VOCAB - 1, : VOCAB - 1].reshape(1, -1)
        even = torch.full_like(pairs, 1 / pairs.numel())
        assert chi_square(pairs, even) < chi_square_limit(pairs.numel() - 1)


def test_scores_of_margin_and_entropy() -> None:
    logits = random_logits(6, 20)
    probability = logits.softmax(-1)
    top = probability.sort(-1, descending=True).values
    margin = proposal_of(row_of(logits, DecodingParams("topk_margin")))
    torch.testing.assert_close(margin.score.float(), top[:, 0] - top[:, 1])
    for policy in ("entropy", "entropy_bound"):
        surety = proposal_of(row_of(logits, DecodingParams(policy)))
        entropy = torch.distributions.Categorical(probability).entropy()
        torch.testing.assert_close(-surety.score.float(), entropy)


@pytest.mark.parametrize("policy", ["maskgit_plus", "topk_margin", "entropy"])
def test_position_that_filters_leave_only_an_end_token_goes_last(policy: Policy) -> None:
    """Not first, as one that is no number would."""
    logits = random_logits(13, 3, scale=0.5)
    logits[0, SPECIAL.eos] = 9
    params = DecodingParams(policy, temperature=0.5, top_k=2, confidence_eos_eot_inf=True)
    params = replace(params, top_k=1) if policy != "topk_margin" else params
    logits[0, SPECIAL.eot] = 8
    proposal, rows = propose_rows([row_of(logits, params, quota=2)])
    assert proposal.confidence.isfinite().all()
    assert proposal.score.isfinite().all()
    assert select(proposal, rows).tolist() == [False, True, True]


def test_guidance_is_none_at_scale_zero_and_extrapolates_above() -> None:
    given_prompt, without = random_logits(7, 2), random_logits(8, 2)
    guided = guide(given_prompt, without, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(guided[0], given_prompt[0])
    torch.testing.assert_close(guided[1], without[1] + 2.5 * (given_prompt[1] - without[1]))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 8),
    weight=st.floats(0.0, 2.0),
    decay=st.floats(0.1, 1.0),
    power=st.floats(0.1, 2.0),
)
def test_credit_equals_a_dense_matrix(
    seed: int, steps: int, weight: float, decay: float, power: float
) -> None:
    """The published loop keeps [positions, vocab]: fade all, then credit the most likely token."""
    positions = 5
    credit = DecodingParams("credit", credit_weight=weight, credit_decay=decay, credit_power=power)
    rows = step_rows([row_of(torch.zeros(positions, VOCAB), credit)])
    evidence = Evidence.none(positions, TEST_DEVICE)
    dense = torch.zeros(positions, VOCAB, device=TEST_DEVICE)
    for i in range(steps):
        logits = random_logits(seed + i, positions, scale=1.0).to(TEST_DEVICE)
        best, token = logits.softmax(-1).max(-1)
        dense = decay * dense
        dense[torch.arange(positions), token] += best**power
        evidence = accumulate(evidence, logits, rows)
        expected = logits + weight * (dense + 1).log()
        torch.testing.assert_close(fuse(logits, evidence, rows), expected, atol=1e-5, rtol=1e-5)


def test_evidence_of_rows_of_different_age_is_joined_without_mixing() -> None:
    credit = DecodingParams("credit")
    young, old = (step_rows([row_of(torch.zeros(n, VOCAB), credit)]) for n in (2, 3))
    evidence = Evidence.none(3, TEST_DEVICE)
    for i in range(4):
        evidence = accumulate(evidence, random_logits(i, 3).to(TEST_DEVICE), old)
    logits = random_logits(9, 2).to(TEST_DEVICE)
    fresh = accumulate(Evidence.none(2, TEST_DEVICE), logits, young)
    joined = Evidence.join([fresh, evidence])
    rows = step_rows([row_of(torch.zeros(n, VOCAB), credit) for n in (2, 3)])
    logits = random_logits(10, 5).to(TEST_DEVICE)
    expected = torch.cat([fuse(logits[:2], fresh, young), fuse(logits[2:], evidence, old)])
    torch.testing.assert_close(fuse(logits, joined, rows), expected)


def test_credit_leaves_other_policies_alone() -> None:
    rows = step_rows([row_of(torch.zeros(2, VOCAB), DecodingParams("threshold"))])
    logits = random_logits(11, 2).to(TEST_DEVICE)
    evidence = accumulate(Evidence.none(2, TEST_DEVICE), logits, rows)
    assert torch.equal(fuse(logits, evidence, rows), logits)


def test_propose_reads_bfloat16() -> None:
    logits = random_logits(12, 3).bfloat16()
    row = row_of(logits, DecodingParams())
    proposal = proposal_of(row)
    assert torch.equal(proposal.token, logits[:, : SPECIAL.mask].float().argmax(-1))
    assert (proposal.confidence <= 1).all()
