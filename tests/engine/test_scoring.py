"""Scores of texts, against direct computation."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.test_infill_row import events_of
from tests.engine.tiny import MASK, logits_of, running, tiny_decoder, tiny_spec
from vdiff_kserve.engine import EngineConfig, GenerationRequest, Scoring, add_scores
from vdiff_kserve.engine.scoring import probe_of
from vdiff_kserve.sampler import DecodingParams

DECODER = tiny_decoder()
TEXT = (1, 2, 3, 4, 5, 6, 7, 8, 9)
LENGTH = len(TEXT)


def request_of(method: str, context: int = 1, **fields: Any) -> GenerationRequest:
    end = fields.pop("end", LENGTH - context)
    first = fields.pop("first", 0)
    scoring = Scoring(method, context, (first, end), **fields)
    return GenerationRequest(TEXT, 0, DecodingParams(top_logprobs=2), scoring=scoring)


def masked(positions: Any) -> torch.Tensor:
    canvas = torch.tensor(TEXT)
    canvas[torch.tensor(positions)] = MASK
    return canvas


def logprobs(canvas: torch.Tensor, decoder: Any = DECODER, shifted: bool = False) -> torch.Tensor:
    told = logits_of(decoder, canvas, shifted=shifted).log_softmax(-1)
    return told[torch.arange(LENGTH), torch.tensor(TEXT)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("context", [1, 4])
def test_the_chain_rule_masks_a_token_and_all_behind_it(context: int, shifted: bool) -> None:
    with running(DECODER, shifted=shifted) as engine:
        ((told,),) = events_of(engine, request_of("chain", context))
    expected = [
        float(logprobs(masked(range(i, LENGTH)), shifted=shifted)[i])
        for i in range(context, LENGTH)
    ]
    assert [each.token_id for each in told.logprobs] == list(TEXT[context:])
    assert [each.logprob for each in told.logprobs] == pytest.approx(expected, abs=1e-4)
    assert told.stats.nfe == LENGTH - context
    assert told.stats.completion_tokens == 0


def test_pseudo_likelihood_masks_one_token_at_a_time() -> None:
    with running(DECODER) as engine:
        ((told,),) = events_of(engine, request_of("pseudo"))
    expected = [float(logprobs(masked([i]))[i]) for i in range(1, LENGTH)]
    assert [each.logprob for each in told.logprobs] == pytest.approx(expected, abs=1e-4)
    for each in told.logprobs:
        assert (each.rank == 1) == (each.top[0] == (each.token_id, each.logprob))


def test_a_causal_model_tells_all_in_one_pass() -> None:
    causal = tiny_decoder(attention_block=1)
    spec = replace(tiny_spec(causal, shifted=True), block_length=1)
    with running(causal, spec=spec) as engine:
        ((told,),) = events_of(engine, request_of("causal", end=1))
    expected = logprobs(torch.tensor(TEXT), causal, shifted=True)[1:].tolist()
    assert [each.logprob for each in told.logprobs] == pytest.approx(expected, abs=1e-4)
    assert told.stats.nfe == 1


def test_monte_carlo_sums_what_its_samples_tell() -> None:
    request = request_of("monte_carlo", 2, end=20, samples=20, seed=5)
    with running(DECODER) as engine:
        ((told,),) = events_of(engine, request)
    expected = torch.zeros(LENGTH)
    for number in range(20):
        probe = probe_of(request.scoring, number, LENGTH)
        share = len(probe.masked) / (LENGTH - 2)
        expected[probe.masked] += logprobs(masked(probe.masked.tolist()))[probe.masked] / share / 20
    assert [each.logprob for each in told.logprobs] == pytest.approx(
        expected[2:].tolist(), abs=1e-4
    )


def test_monte_carlo_draws_every_number_of_masks_equally_often_and_any_tokens() -> None:
    total = LENGTH - 2
    scoring = request_of("monte_carlo", 2, end=0, samples=3 * total, seed=1).scoring
    probes = [probe_of(scoring, number, LENGTH) for number in range(3 * total)]
    assert Counter(len(p.masked) for p in probes) == dict.fromkeys(range(1, total + 1), 3)
    assert {tuple(p.masked.tolist()) for p in probes if len(p.masked) == 1} != {(2,)}
    assert min(int(p.masked.min()) for p in probes) == 2


def test_parts_of_the_work_come_to_the_whole() -> None:
    chain = [request_of("chain", first=0, end=3), request_of("chain", first=3)]
    sampled = [
        request_of("monte_carlo", first=a, end=b, samples=12, seed=3) for a, b in ((0, 5), (5, 12))
    ]
    whole = [request_of("chain"), request_of("monte_carlo", end=12, samples=12, seed=3)]
    with running(DECODER, EngineConfig(max_num_seqs=3)) as engine:
        told = [
            each for ((each,),) in zip(events_of(engine, *chain, *sampled, *whole), strict=True)
        ]
    joined = told[0].logprobs + told[1].logprobs
    summed = [add_scores(*pair) for pair in zip(told[2].logprobs, told[3].logprobs, strict=True)]
    for parts, all_of_it in ((joined, told[4].logprobs), (summed, told[5].logprobs)):
        assert [e.logprob for e in parts] == pytest.approx([e.logprob for e in all_of_it], abs=1e-4)
        assert [e.rank for e in parts] == [e.rank for e in all_of_it]


def test_the_likeliest_token_tells_whether_the_text_is_greedy() -> None:
    request = request_of("monte_carlo", end=30, samples=30)
    with running(DECODER) as engine:
        ((told,),) = events_of(engine, request)
    for each in told.logprobs:
        ((token, logprob),) = each.top
        assert (logprob > each.logprob) == (each.rank > 1)
        assert token == each.token_id or each.rank > 1


def test_a_text_of_which_a_client_lost_interest_is_given_up() -> None:
    request = replace(request_of("chain"), deadline=time.monotonic() - 1)
    with running(DECODER) as engine, pytest.raises(Exception, match="time was over"):
        engine.generate([request])
