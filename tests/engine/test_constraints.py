"""Constraints and log probabilities through the engine, for every policy."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch

from tests.engine.tiny import (
    EOS,
    MASK,
    WatchingEngine,
    generate,
    logits_of,
    request_of,
    running,
    tiny_auxiliary,
    tiny_decoder,
    tiny_spec,
)
from vdiff_kserve.engine import GenerationEvent, GenerationRequest, TokenLogprob
from vdiff_kserve.models import Decoder
from vdiff_kserve.sampler import SCHEDULED_POLICIES, Constraints, Policy

POLICIES: tuple[Policy, ...] = get_args(Policy)
DECODER = tiny_decoder()
AUXILIARY = tiny_auxiliary()
PLAIN = dict(threshold=0.3, edit_threshold=0.3, apd_threshold=0.05, entropy_bound=3.0, factor=3.0)
every_policy = pytest.mark.parametrize(
    ("policy", "auxiliary"), [*((policy, None) for policy in POLICIES), ("apd", AUXILIARY)]
)


def decoding_of(policy: Policy) -> dict[str, Any]:
    """Decoding that writes several tokens per step."""
    steps = 8 if policy in SCHEDULED_POLICIES else None
    return PLAIN | {"policy": policy, "steps": steps}


def asking(policy: Policy, **constraints: Any) -> GenerationRequest:
    return request_of(max_tokens=24, constraints=Constraints(**constraints), **decoding_of(policy))


def text(request: GenerationRequest, auxiliary: Decoder | None) -> tuple[int, ...]:
    (result,) = generate(DECODER, request, auxiliary=auxiliary)
    return result.token_ids


@every_policy
def test_only_allowed_tokens_are_written(policy: Policy, auxiliary: Decoder | None) -> None:
    assert set(text(asking(policy, allowed_token_ids=(5, 6, MASK)), auxiliary)) <= {5, 6}


@every_policy
def test_a_strong_bias_decides(policy: Policy, auxiliary: Decoder | None) -> None:
    assert set(text(asking(policy, logit_bias=((7, 100.0),)), auxiliary)) == {7}


@every_policy
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_word_never_stands(
    policy: Policy, auxiliary: Decoder | None, temperature: float
) -> None:
    """Three tokens only, so that pairs would come up all the time, several of them in one step."""
    words = ((1, 1), (1, 2), (2, 2, 2), (2, 3))
    request = asking(policy, allowed_token_ids=(1, 2, 3), bad_words=words)
    request = replace(request, decoding=replace(request.decoding, temperature=temperature))
    written = text(request, auxiliary)
    assert len(written) == 24
    pairs = set(pairwise(written))
    assert not pairs & {(1, 1), (1, 2), (2, 3)}
    assert not any(written[i : i + 3] == (2, 2, 2) for i in range(22))


@every_policy
def test_no_end_token_at_the_first_positions(policy: Policy, auxiliary: Decoder | None) -> None:
    wanted = ((EOS, 50.0),)
    request = asking(policy, min_tokens=7, end_token_ids=(EOS,), logit_bias=wanted)
    (result,) = generate(DECODER, replace(request, end_token_ids=(EOS,)), auxiliary=auxiliary)
    assert (len(result.token_ids), result.finish_reason) == (7, "stop")


@every_policy
def test_a_presence_penalty_that_outweighs_the_model_forbids_repeating_later(
    policy: Policy, auxiliary: Decoder | None
) -> None:
    """Tokens of one step may be alike; a later step may not write them again."""
    request = asking(policy, presence_penalty=1e6)
    with running(DECODER, auxiliary=auxiliary) as engine:
        engine.generate([request])
    for step in engine.watched[0].steps:
        before = set(step.before[3:][~step.masked_before[3:]].tolist())
        fresh = step.masked_before[step.decision.positions].numpy()
        assert not set(step.decision.tokens[fresh].tolist()) & before


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("asked", [{"allowed_token_ids": (5,)}, {"logit_bias": ((5, 100.0),)}])
def test_draft_and_check_are_both_constrained(weight: float, asked: dict[str, Any]) -> None:
    """Both are sure of the only token there is, so every draft of eight is accepted."""
    request = asking("apd", **asked)
    decoding = replace(request.decoding, apd_mixture_weight=weight, apd_max_parallel=8)
    (result,) = generate(DECODER, replace(request, decoding=decoding), auxiliary=AUXILIARY)
    assert result.token_ids == (5,) * 24
    assert result.stats.nfe == 3


def test_tokens_behind_the_end_do_not_count() -> None:
    """A canvas full of end tokens would make the end unlikely, and the answer endless."""
    request = asking("threshold", logit_bias=((EOS, 30.0),), end_token_ids=(EOS,))
    plain = text(request, None)
    constraints = replace(request.decoding.constraints, frequency_penalty=2.0)
    penalized = replace(request, decoding=replace(request.decoding, constraints=constraints))
    assert set(plain) == set(text(penalized, None)) == {EOS}


@every_policy
def test_constrained_rows_do_not_depend_on_their_neighbours(
    policy: Policy, auxiliary: Decoder | None
) -> None:
    mine = asking(
        policy,
        bad_words=((1, 2), (5, 6, 7)),
        min_tokens=4,
        end_token_ids=(EOS,),
        frequency_penalty=0.7,
        repetition_penalty=1.3,
        logit_bias=((4, 2.0),),
    )
    others = [
        request_of(max_tokens=24),
        asking(policy, allowed_token_ids=(1, 2, 3), presence_penalty=2.0),
        asking("credit", bad_words=((3, 3),)),
    ]
    alone = text(mine, auxiliary)
    together = generate(DECODER, others[0], mine, *others[1:], auxiliary=auxiliary)
    assert together[1].token_ids == alone
    assert together[0] == generate(DECODER, others[0])[0]


@pytest.mark.parametrize("policy", sorted(SCHEDULED_POLICIES))
def test_a_schedule_that_must_wait_still_ends(policy: Policy) -> None:
    """Every position would go in the last step; all but the first complete a bad word."""
    words = tuple((a, b) for a in (1, 2) for b in (1, 2))
    request = request_of(
        max_tokens=16,
        policy=policy,
        steps=2,
        constraints=Constraints(bad_words=words, logit_bias=((1, 60.0), (2, 60.0))),
    )
    (result,) = generate(DECODER, request)
    assert len(result.token_ids) == 16
    assert not set(pairwise(result.token_ids)) & set(words)


def events_of(engine: WatchingEngine, request: GenerationRequest) -> list[GenerationEvent]:
    async def collect() -> list[GenerationEvent]:
        (stream,) = engine.submit([request])
        return [event async for event in stream]

    return asyncio.run(collect())


@every_policy
def test_log_probabilities_are_of_the_step_that_wrote_the_token(
    policy: Policy, auxiliary: Decoder | None
) -> None:
    """The softmax of the plain model over the canvas as it was, whatever the request asks."""
    asked = dict(top_logprobs=3, temperature=0.8, top_k=2, seed=4)
    constraints = Constraints(logit_bias=((7, 2.0),), presence_penalty=0.5)
    request = request_of(max_tokens=16, constraints=constraints, **decoding_of(policy), **asked)
    request = replace(request, end_token_ids=(EOS,))
    with running(DECODER, auxiliary=auxiliary) as engine:
        events = events_of(engine, request)
    steps, expected = engine.watched[0].steps, {}
    for step in steps:
        canvas = step.before[: step.decision.span.keys]
        logits = logits_of(DECODER, canvas)
        for position, token in zip(
            step.decision.positions.tolist(), step.decision.tokens.tolist(), strict=True
        ):
            expected[position] = (token, logits[position].log_softmax(-1))
    tokens, told = [], []
    for event in events:
        ends = [] if event.end_token_id is None else [event.end_token_id]
        tokens += [*event.token_ids, *ends]
        assert len(event.logprobs) == len(event.token_ids) + len(ends)
        told += event.logprobs
    assert [each.token_id for each in told] == tokens
    for position, each in enumerate(told, start=3):
        token, scores = expected[position]
        assert each.token_id == token
        assert each.logprob == pytest.approx(float(scores[token]), abs=1e-4)
        scores[MASK] = -torch.inf
        assert each.rank == 1 + int((scores > scores[token] + 1e-6).sum())
        best = scores.topk(3)
        assert [t for t, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_who_asks_for_no_log_probabilities_gets_none() -> None:
    asks, plain = request_of(top_logprobs=1), request_of(prompt=(4, 5))
    with running(DECODER) as engine:

        async def collect() -> list[list[GenerationEvent]]:
            streams = engine.submit([plain, asks])
            return [[event async for event in stream] for stream in streams]

        without, with_ones = asyncio.run(collect())
    assert not any(event.logprobs for event in without)
    told: list[TokenLogprob] = [each for event in with_ones for each in event.logprobs]
    assert [len(each.top) for each in told] == [1] * 16


def test_block_causal_rows_are_constrained_too() -> None:
    decoder = tiny_decoder(attention_block=4)
    spec = replace(tiny_spec(decoder), block_length=4)
    assert spec.block_causal
    constraints = Constraints(allowed_token_ids=(1, 2), bad_words=((1, 1), (2, 2)), min_tokens=3)
    request = request_of(
        max_tokens=10, policy="threshold", threshold=0.01, block_length=4, cache="exact",
        constraints=constraints,
    )  # fmt: skip
    with running(decoder, spec=spec) as engine:
        (result,) = engine.generate([request])
    assert result.token_ids in ((1, 2) * 5, (2, 1) * 5)
