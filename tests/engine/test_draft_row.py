"""Drafts of answers: what the model would write itself is accepted, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.test_infill_row import events_of
from tests.engine.tiny import running, tiny_decoder
from vdiff_kserve.engine import GenerationRequest
from vdiff_kserve.engine.draft_row import in_runs
from vdiff_kserve.sampler import DecodingParams

DECODER = tiny_decoder()
PROMPT = (1, 2, 3)


def request_of(draft: tuple[int, ...] = (), **fields: Any) -> GenerationRequest:
    given = fields.pop("given", ())
    decoding = DecodingParams(**({"block_length": 8, "policy": "threshold"} | fields))
    return GenerationRequest(PROMPT, 24, decoding, draft=draft, given=given)


def answer(engine: Any, request: GenerationRequest) -> tuple[tuple[int, ...], Any]:
    (told,) = events_of(engine, request)
    return tuple(t for e in told for t in e.token_ids), told[-1].stats


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_with_its_own_answer_as_draft_the_model_takes_fewer_passes(cache: str) -> None:
    with running(DECODER) as engine:
        plain, cost = answer(engine, request_of(cache=cache, policy="low_confidence"))
        drafted, less = answer(engine, request_of(plain, cache=cache, policy="low_confidence"))
    assert less.accepted > 0
    assert less.nfe <= cost.nfe
    assert less.completion_tokens == 24
    assert len(drafted) == 24


def test_a_draft_that_is_wrong_everywhere_changes_nothing() -> None:
    with running(DECODER) as engine:
        plain, cost = answer(engine, request_of(threshold=0.9))
        wrong = tuple((token + 1) % 30 for token in plain)
        drafted, same = answer(engine, request_of(wrong, threshold=0.9))
    assert drafted == plain
    assert same.accepted == 0
    assert same.nfe <= cost.nfe + 3  # a check for each block


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", ["threshold", "low_confidence", "entropy", "credit"])
def test_whatever_the_draft_and_the_model_s_doubts_the_answer_is_whole(
    policy: str, seed: int
) -> None:
    draft = tuple(torch.randint(0, 30, (5 + 7 * seed,), generator=torch.manual_seed(seed)).tolist())
    doubting = tiny_decoder(seed)
    doubting.lm_head.weight.mul_(0.2)
    with running(doubting) as engine:
        tokens, stats = answer(engine, request_of(draft, policy=policy, threshold=0.9))
    assert len(tokens) == stats.completion_tokens == 24


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("policy", ["low_confidence", "entropy"])
def test_a_short_answer_with_more_steps_than_tokens_ends(policy: str, length: int) -> None:
    """A check takes a step of the schedule, and there are runs of three in no shorter answer."""
    request = request_of((-1, 3), policy=policy, steps=9, top_logprobs=0)
    with running(DECODER) as engine:
        tokens, stats = answer(engine, replace(request, max_tokens=length))
    assert len(tokens) == stats.completion_tokens == length


def test_only_tokens_that_the_model_proposed_are_ever_written() -> None:
    draft = tuple(range(5, 29))
    with running(DECODER) as engine:
        answer(engine, request_of(draft, threshold=0.9))
        (watched,) = engine.watched
    for step in watched.steps:
        fresh = (step.masked_before & ~step.masked_after).nonzero().squeeze(-1)
        proposed = dict(
            zip(step.decision.positions.tolist(), step.decision.tokens.tolist(), strict=True)
        )
        for position in fresh.tolist():
            assert int(step.after[position]) == proposed[position]


def test_pinned_tokens_stay() -> None:
    given = (-1, 20, -1, 21, *[-1] * 12, *[22] * 8)
    with running(DECODER) as engine:
        for draft in ((), tuple(range(24))):
            tokens, stats = answer(engine, request_of(draft, given=given))
            assert len(tokens) == stats.completion_tokens == 24
            assert [t for t, g in zip(tokens, given, strict=True) if g >= 0] == [
                g for g in given if g >= 0
            ]


@pytest.mark.parametrize("policy", ["threshold", "p2"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_pinned_token_is_told_as_certain(policy: str, count: int) -> None:
    given = (-1, 4, -1, -1, *[7] * 3, *[-1] * 17)
    request = request_of(given=given, policy=policy, steps=12, top_logprobs=count)
    with running(DECODER) as engine:
        (told,) = events_of(engine, replace(request, watched=True))
    logprobs = [each for event in told for each in event.logprobs]
    assert [each.token_id for each in logprobs] == [t for e in told for t in e.token_ids]
    for token, each in zip(given, logprobs, strict=True):
        certain = each.logprob == 0 and each.top == ((token, 0.0),) * min(count, 1)
        assert certain == (token >= 0)


def test_a_run_is_so_many_neighbours() -> None:
    alike = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    assert in_runs(alike, 3).long().tolist() == [[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]]
