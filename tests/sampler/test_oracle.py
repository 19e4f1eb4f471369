"""With a model that is never wrong, decoding one token at a time gives the true distribution, and
decoding in parallel errs the less the tighter its bound is."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.sampler.markov import (
    STATES,
    TRANSITIONS,
    chi_square,
    chi_square_limit,
    log_posterior,
    sample,
    transition_counts,
    transition_gap,
    trigram_chi_square,
)

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")

BIGRAM_LIMIT = chi_square_limit(STATES * (STATES - 1))
TRIGRAM_LIMIT = chi_square_limit(STATES * STATES * (STATES - 1))
SEQUENCES = 400


@cache
def gap(**decoding: Any) -> float:
    return transition_gap(sample(SEQUENCES, **decoding)[0])


def test_posterior_equals_summing_over_all_sequences() -> None:
    canvas = torch.tensor([2, 6, 6, 4, 6])
    joint = torch.zeros(STATES, STATES, STATES, dtype=torch.float64)
    for a in range(STATES):
        for b in range(STATES):
            before = TRANSITIONS[2, a] * TRANSITIONS[a, b] * TRANSITIONS[b, 4]
            joint[a, b] = before * TRANSITIONS[4]
    joint /= joint.sum()
    posterior = log_posterior(canvas[None], TRANSITIONS)[0].exp()
    torch.testing.assert_close(posterior[1, :STATES], joint.sum((1, 2)))
    torch.testing.assert_close(posterior[2, :STATES], joint.sum((0, 2)))
    torch.testing.assert_close(posterior[4, :STATES], joint.sum((0, 1)))
    assert posterior[3, 4] == 1
    assert (posterior[:, STATES:] == 0).all()


@pytest.mark.parametrize("block_length", [16, 4])
def test_one_token_at_a_time_in_random_order_is_exact(block_length: int) -> None:
    """The order depends on nothing else."""
    sequences, tokens_per_forward = sample(800, policy="random", block_length=block_length)
    assert tokens_per_forward == 1
    assert chi_square(transition_counts(sequences), TRANSITIONS) < BIGRAM_LIMIT
    assert trigram_chi_square(sequences) < TRIGRAM_LIMIT


def test_one_token_at_a_time_by_entropy_is_exact() -> None:
    """The order depends on what is written, not on what is drawn."""
    sequences, tokens_per_forward = sample(800, policy="entropy_bound", entropy_bound=0.0, seed=7)
    assert tokens_per_forward == 1
    assert chi_square(transition_counts(sequences), TRANSITIONS) < BIGRAM_LIMIT
    assert trigram_chi_square(sequences) < TRIGRAM_LIMIT


def test_order_by_the_confidence_of_what_was_drawn_is_biased() -> None:
    """LLaDA's own order: unlikely draws are put off until they are no longer drawn. No parallel
    step is to blame, so this is the floor below which no policy by confidence comes."""
    one_by_one = sample(SEQUENCES, policy="low_confidence")[0]
    counts = transition_counts(one_by_one)
    assert chi_square(counts, TRANSITIONS) > 5 * BIGRAM_LIMIT
    frequency = counts / counts.sum(-1, keepdim=True)
    assert (frequency.diagonal() > TRANSITIONS.diagonal()).all()


LOOSER: dict[str, tuple[dict[str, Any], ...]] = {
    "random": tuple(dict(steps=steps) for steps in (16, 4, 1)),
    "low_confidence": tuple(dict(steps=steps) for steps in (16, 2, 1)),
    "topk_margin": tuple(dict(steps=steps) for steps in (16, 4, 1)),
    "entropy": tuple(dict(steps=steps) for steps in (16, 4, 1)),
    "maskgit_plus": tuple(dict(steps=steps) for steps in (16, 4, 1)),
    "threshold": tuple(dict(threshold=threshold) for threshold in (1.0, 0.3, 0.1)),
    "factor": tuple(dict(factor=factor) for factor in (0.5, 4.0, 8.0)),
    "entropy_bound": tuple(dict(entropy_bound=bound) for bound in (0.0, 2.0, 8.0)),
    "local": tuple(dict(threshold=t, neighbour_threshold=t * 0.6) for t in (1.0, 0.4, 0.2)),
    "credit": tuple(dict(threshold=threshold) for threshold in (0.8, 0.2, 0.1)),
    "apd": tuple(dict(apd_threshold=t, apd_max_parallel=16) for t in (1.0, 0.3, 0.1)),
}
"""Per policy, settings from the tightest to the loosest."""


@pytest.mark.parametrize("policy", LOOSER)
def test_parallel_decoding_errs_less_the_tighter_it_is(policy: str) -> None:
    gaps = [gap(policy=policy, **knobs) for knobs in LOOSER[policy]]
    tolerance = 0.012
    for tighter, looser in pairwise(gaps):
        assert looser > tighter - tolerance, gaps
    assert gaps[-1] > 5 * max(gaps[0], tolerance), gaps


def test_apd_bounds_what_it_commits_at_once() -> None:
    loose = dict(policy="apd", apd_threshold=0.1)
    gaps = [gap(**loose, apd_max_parallel=most) for most in (1, 4, 16)]
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] == gap(policy="low_confidence")


def apd(weight: float, sequences: int = SEQUENCES) -> tuple[torch.Tensor, float]:
    return sample(
        sequences,
        with_chain=True,
        policy="apd",
        apd_mixture_weight=weight,
        apd_window=None,
        apd_max_parallel=16,
    )


def test_apd_that_trusts_the_auxiliary_model_is_exact_and_parallel() -> None:
    """At R = 0 a draft is accepted where the causal model draws the same token with the same
    noise, and a rejected place is drawn again with it: so the result is the causal model's own."""
    sequences, tokens_per_forward = apd(0.0, 800)
    assert tokens_per_forward > 3
    assert chi_square(transition_counts(sequences), TRANSITIONS) < BIGRAM_LIMIT
    assert trigram_chi_square(sequences) < TRIGRAM_LIMIT
    one_by_one, _ = sample(800, with_chain=True, policy="apd", apd_max_parallel=1, apd_window=None)
    assert torch.equal(sequences, one_by_one)


def test_apd_trades_exactness_for_speed_by_its_mixture_weight() -> None:
    runs = [apd(weight) for weight in (0.0, 0.3, 0.7, 1.0)]
    gaps = [transition_gap(sequences) for sequences, _ in runs]
    speeds = [tokens_per_forward for _, tokens_per_forward in runs]
    assert gaps == sorted(gaps)
    assert speeds == sorted(speeds)
    assert speeds[-1] == 16
