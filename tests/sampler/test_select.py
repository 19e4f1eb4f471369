"""Which positions a step commits: what every policy promises, and each against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device import TEST_DEVICE
from tests.sampler.random_rows import open_rows
from tests.sampler.rows import (
    POLICIES,
    SPECIAL,
    OpenRow,
    propose_rows,
    row_of,
    step,
)
from vdiff_kserve.sampler import (
    DREAM_POLICIES,
    SCHEDULED_POLICIES,
    DecodingParams,
    Policy,
    block_steps,
    quota,
    select,
)
from vdiff_kserve.sampler.select import first_in_row, rank_in_row

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")

many = settings(max_examples=60, deadline=None)
batches = st.lists(open_rows(), min_size=1, max_size=6)


@pytest.mark.parametrize("policy", POLICIES)
def test_step_keeps_its_promises(policy: Policy) -> None:
    @many
    @given(row=open_rows((policy,)))
    def check(row: OpenRow) -> None:
        (outcome,) = step([row])
        assert SPECIAL.mask not in outcome.tokens
        if row.params.logits_eos_inf:
            assert SPECIAL.eos not in outcome.tokens
        on_masks = sum(yes for yes, mask in zip(outcome.accept, row.masks, strict=True) if mask)
        if policy == "p2":
            written = [yes == mask for yes, mask in zip(outcome.accept, row.masks, strict=True)]
            assert sum(written) == min(row.quota, len(written)), "as many as the schedule has stay"
            return
        if policy != "edit":
            assert on_masks == sum(outcome.accept)
        if any(row.masks):
            assert on_masks >= 1
        if policy in SCHEDULED_POLICIES:
            assert on_masks == row.quota
        if policy == "apd":
            assert on_masks <= row.quota

    check()


@many
@given(rows=batches)
def test_result_of_a_row_is_the_same_alone_and_in_any_batch(rows: list[OpenRow]) -> None:
    assert step(rows) == [step([row])[0] for row in rows]


@many
@given(rows=batches, data=st.data())
def test_permutation_of_rows_permutes_the_results(rows: list[OpenRow], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    expected = step(rows)
    assert step([rows[i] for i in order]) == [expected[i] for i in order]


def accepted_by_loop(row: OpenRow, confidence: list[float], score: list[float]) -> list[bool]:
    """The policies that go by confidence, written down position by position."""
    p = row.params
    if p.policy == "p2":
        stay = sorted(range(len(score)), key=lambda i: (-score[i], i))[: row.quota]
        return [(i in stay) == mask for i, mask in enumerate(row.masks)]
    masks = [i for i, mask in enumerate(row.masks) if mask]
    ranked = sorted(masks, key=lambda i: (-score[i], i))
    sure = {i for i in masks if confidence[i] >= p.threshold}
    surer = {i for i in masks if confidence[i] > p.threshold}
    chosen = {
        "threshold": lambda: sure,
        "credit": lambda: sure,
        "dynamic": lambda: surer if len(surer) >= row.quota else set(ranked[: row.quota]),
        "edit": lambda: surer | edited_by_loop(row, confidence),
        "apd": lambda: surest_by_loop(row, confidence, ranked),
        "local": lambda: sure | neighbours_by_loop(row, confidence, sure, masks),
        "factor": lambda: leading_by_loop(row, confidence, ranked),
        "entropy_bound": lambda: leading_entropy_by_loop(row, score, ranked),
        "entropy_sum": lambda: all_entropy_by_loop(row, score, ranked),
    }[p.policy]()
    return [i in chosen | set(ranked[:1]) for i in range(len(row.written))]


def edited_by_loop(row: OpenRow, confidence: list[float]) -> set[int]:
    tokens = step([row])[0].tokens
    return {
        i
        for i, written in enumerate(row.written)
        if written >= 0 and confidence[i] > row.params.edit_threshold and tokens[i] != written
    }


def surest_by_loop(row: OpenRow, confidence: list[float], ranked: list[int]) -> set[int]:
    least = 0.9 if row.params.apd_threshold is None else row.params.apd_threshold
    return {i for i in ranked[: row.quota] if confidence[i] >= least}


def neighbours_by_loop(
    row: OpenRow, confidence: list[float], anchors: set[int], masks: list[int]
) -> set[int]:
    near = set()
    for i in masks:
        distances = [abs(row.positions[i] - row.positions[anchor]) for anchor in anchors]
        close = any(distance <= row.params.radius for distance in distances)
        if close and confidence[i] >= row.params.neighbour_threshold:
            near.add(i)
    return near


def leading_by_loop(row: OpenRow, confidence: list[float], ranked: list[int]) -> set[int]:
    factor, count = row.params.factor, 1
    while count < len(ranked) and confidence[ranked[count]] >= 1 - factor / (count + 2):
        count += 1
    if count == len(ranked) - 1:  # Fast-dLLM lets the last one through
        count += 1
    return set(ranked[:count])


def leading_entropy_by_loop(row: OpenRow, score: list[float], ranked: list[int]) -> set[int]:
    spent, chosen = 0.0, set()
    for i in ranked:
        if spent <= row.params.entropy_bound:
            chosen.add(i)
        spent -= score[i]
    return chosen


def all_entropy_by_loop(row: OpenRow, score: list[float], ranked: list[int]) -> set[int]:
    spent, chosen = 0.0, set()
    for i in ranked:
        spent -= score[i]
        if spent < row.params.entropy_bound:
            chosen.add(i)
    return chosen


@pytest.mark.parametrize(
    "policy", [policy for policy in POLICIES if policy not in SCHEDULED_POLICIES]
)
def test_policy_equals_a_plain_loop(policy: Policy) -> None:
    @settings(max_examples=120, deadline=None)
    @given(rows=st.lists(open_rows((policy,)), min_size=1, max_size=4))
    def check(rows: list[OpenRow]) -> None:
        proposal, batch = propose_rows(rows)
        accept = select(proposal, batch).tolist()
        start = 0
        for row in rows:
            end = start + len(row.positions)
            confidence, score = proposal.confidence[start:end], proposal.score[start:end]
            expected = accepted_by_loop(row, confidence.tolist(), score.tolist())
            assert accept[start:end] == expected
            start = end

    check()


def logits_of(confidences: list[float]) -> torch.Tensor:
    """Logits whose most likely token has exactly about these probabilities, the rest shared."""
    rows = torch.full((len(confidences), 12), -30.0)
    for i, confidence in enumerate(confidences):
        rows[i, i % 8] = math.log(confidence)
        rows[i, 8] = math.log(max(1 - confidence, 1e-9))
    return rows


def accepted(confidences: list[float], params: DecodingParams, quota: int = 1) -> list[bool]:
    return list(step([row_of(logits_of(confidences), params, quota=quota)])[0].accept)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (DecodingParams("threshold", threshold=0.85), [False, True, True, False, False]),
        (DecodingParams("threshold", threshold=0.999), [False, True, False, False, False]),
        (DecodingParams("factor", factor=0.45), [False, True, True, False, False]),
        (DecodingParams("factor", factor=0.01), [False, True, False, False, False]),
        (
            DecodingParams("local", threshold=0.92, neighbour_threshold=0.7, radius=2),
            [False, True, True, True, False],
        ),
        (
            DecodingParams("local", threshold=0.92, neighbour_threshold=0.7, radius=1),
            [False, True, True, False, False],
        ),
        (DecodingParams("entropy_bound", entropy_bound=0.2), [False, True, True, False, False]),
        (DecodingParams("entropy_sum", entropy_bound=0.2), [False, True, False, False, False]),
        (DecodingParams("entropy_sum", entropy_bound=0.6), [False, True, True, False, False]),
        (DecodingParams("sequential"), [True, True, True, True, False]),
        (DecodingParams("dynamic", threshold=0.9), [False, True, True, True, True]),
        (DecodingParams("dynamic", threshold=0.6), [False, True, True, True, True]),
        (DecodingParams("dynamic", threshold=0.5), [True, True, True, True, True]),
        (DecodingParams("apd"), [False, True, True, False, False]),
        (DecodingParams("apd", apd_threshold=0.5), [False, True, True, True, True]),
    ],
    ids=lambda value: value.policy if isinstance(value, DecodingParams) else None,
)
def test_examples_by_hand(params: DecodingParams, expected: list[bool]) -> None:
    """Confidences .55 .95 .91 .80 .75; four by schedule, which for apd is the most at once."""
    assert accepted([0.55, 0.95, 0.91, 0.80, 0.75], params, quota=4) == expected


def test_factor_lets_the_last_one_through() -> None:
    """Fast-dLLM's published loop does, and equality with it is asked for."""
    assert accepted([0.99, 0.6], DecodingParams("factor", factor=0.1)) == [True, True]


def test_schedule_takes_the_most_confident() -> None:
    params = DecodingParams("low_confidence")
    assert accepted([0.6, 0.9, 0.8, 0.7], params, 1) == [False, True, False, False]
    assert accepted([0.6, 0.9, 0.8, 0.7], params, 3) == [False, True, True, True]


def test_random_order_is_that_of_its_seed_only() -> None:
    sharp, flat = logits_of([0.9, 0.6, 0.7, 0.8]), torch.zeros(4, 12)
    orders = set()
    for seed in range(40):
        params = DecodingParams("random", seed=seed)
        first = step([row_of(sharp, params)])[0].accept
        assert first == step([row_of(flat, params)])[0].accept
        orders.add(first)
    assert len(orders) == 4


def test_alg_temp_draws_positions_by_their_score() -> None:
    """A Gumbel draw from softmax(score / alg_temp), so the surest comes first most often."""
    logits = logits_of([0.6, 0.95, 0.7])
    counts = torch.zeros(3, dtype=torch.float64)
    rows = [
        row_of(logits, DecodingParams("maskgit_plus", alg_temp=0.2, seed=seed))
        for seed in range(3000)
    ]
    for outcome in step(rows):
        counts[outcome.accept.index(True)] += 1
    expected = (torch.tensor([0.6, 0.95, 0.7], dtype=torch.float64) / 0.2).softmax(-1)
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.03, rtol=0)


def test_confidence_eos_eot_inf_leaves_end_tokens_for_last() -> None:
    logits = torch.zeros(3, 12)
    logits[0, SPECIAL.eos] = logits[1, SPECIAL.eot] = 20
    logits[2, 4] = 1
    for policy in ("low_confidence", "threshold", "topk_margin", "entropy_bound"):
        kept = DecodingParams(policy, confidence_eos_eot_inf=True, entropy_bound=0.0)
        (outcome,) = step([row_of(logits, kept)])
        assert outcome.tokens == (SPECIAL.eos, SPECIAL.eot, 4)
        if policy in ("low_confidence", "threshold"):
            assert outcome.accept == (False, False, True)
    (outcome,) = step([row_of(logits, DecodingParams("low_confidence"))])
    assert outcome.accept[2] is False


@many
@given(
    priority=st.lists(st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=20),
    data=st.data(),
)
def test_rank_counts_the_better_ones_of_the_row(priority: list[float], data: st.DataObject) -> None:
    numbers = st.integers(0, 4)
    row = sorted(data.draw(st.lists(numbers, min_size=len(priority), max_size=len(priority))))
    there = [torch.tensor(values, device=TEST_DEVICE) for values in (priority, row)]
    ranks = rank_in_row(*there, row[-1] + 1).tolist()
    assert first_in_row(*there, row[-1] + 1).tolist() == [rank == 0 for rank in ranks]
    for i, rank in enumerate(ranks):
        better = [
            j for j in range(len(row)) if row[j] == row[i] and (-priority[j], j) < (-priority[i], i)
        ]
        assert rank == len(better)


@given(masks=st.integers(1, 64), steps=st.integers(1, 80))
def test_llada_schedule_sums_to_the_masks(masks: int, steps: int) -> None:
    params = DecodingParams("low_confidence")
    quotas = [quota(params, masks, 0, steps, step) for step in range(steps)]
    assert sum(quotas) == masks
    assert max(quotas) - min(quotas) <= 1
    assert quotas == sorted(quotas, reverse=True)


@given(
    policy=st.sampled_from(sorted(DREAM_POLICIES)),
    masks=st.integers(1, 64),
    steps=st.integers(1, 80),
)
def test_dream_schedule_sums_to_the_masks(policy: Policy, masks: int, steps: int) -> None:
    left, params = masks, DecodingParams(policy)
    for number in range(steps):
        share = quota(params, masks, left, steps, number)
        assert 0 <= share <= left
        now, then = (1 - 0.999 * k / steps for k in (number, number + 1))
        if number < steps - 1:
            assert share == pytest.approx(left * (1 - then / now), abs=1.001)
        left -= share
    assert left == 0


@given(
    blocks=st.lists(st.integers(1, 32), min_size=1, max_size=8),
    steps=st.none() | st.integers(1, 99),
)
def test_steps_are_shared_out_over_the_blocks(blocks: list[int], steps: int | None) -> None:
    params = DecodingParams(steps=steps)
    shares = [block_steps(params, sum(blocks), length) for length in blocks]
    assert all(share >= 1 for share in shares)
    if steps is None:
        assert shares == blocks
    else:
        assert abs(sum(shares) - steps) <= len(blocks)
    if steps is not None and len(set(blocks)) == 1 and steps % len(blocks) == 0:
        assert set(shares) == {steps // len(blocks)}


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_part_of_a_block_takes_no_more_steps_than_asked_for(
    answer: int, prompt_tail: int, data: st.DataObject
) -> None:
    """A block-causal model's block begins with the prompt's tail and is scheduled as a whole."""
    params = DecodingParams(steps=data.draw(st.integers(1, answer)))
    block = answer + prompt_tail
    steps = block_steps(params, answer, block)
    quotas = [quota(params, block, 0, steps, step) for step in range(steps)]
    assert sum(quotas[: params.steps]) >= answer
