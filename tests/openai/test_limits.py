"""How a request's decoding follows from what it says and what the server does by default."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.openai.engine import limits
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.limits import (
    answer_length,
    check,
    decoding_params,
    time_allowed,
    with_seed_of,
)
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.sampler import DecodingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def request(**fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


def test_a_request_that_says_nothing_takes_the_servers_decoding() -> None:
    default = DecodingParams(policy="threshold", threshold=0.8, block_length=16)
    params = decoding_params(request(seed=1), limits(decoding=default))
    assert params == replace(default, seed=1)


def test_eos_options_and_top_k_of_minus_one_are_understood() -> None:
    params = decoding_params(request(logits_eos_inf=True, top_k=-1, min_p=0.1), limits())
    assert (params.logits_eos_inf, params.confidence_eos_eot_inf) == (True, False)
    assert (params.top_k, params.min_p) == (0, 0.1)


def test_seeds_differ_when_none_is_given() -> None:
    seeds = {decoding_params(request(), limits()).seed for _ in range(20)}
    assert len(seeds) > 15


@pytest.mark.parametrize(("seed", "expected"), [(0, 2), (-1, 1), (2**63 - 1, -(2**63) + 1)])
def test_the_seeds_of_choices_count_up_and_wrap(seed: int, expected: int) -> None:
    assert with_seed_of(DecodingParams(seed=seed), 0).seed == seed
    assert with_seed_of(DecodingParams(seed=seed), 2).seed == expected


def test_lengths() -> None:
    chat = ChatCompletionRequest(messages=MESSAGES)
    assert answer_length(chat, 10, limits()) == 50
    assert answer_length(chat, 80, limits()) == 20
    assert answer_length(request(), 10, limits()) == 16
    assert answer_length(request(max_tokens=None), 10, limits()) == 50
    both = ChatCompletionRequest(messages=MESSAGES, max_tokens=5, max_completion_tokens=7)
    assert answer_length(both, 10, limits()) == 7
    assert answer_length(request(max_tokens=100), 10, limits()) == 90  # what the prompt leaves


@pytest.mark.parametrize("wanted", [0, -1, 101])
def test_lengths_that_no_answer_has_are_refused(wanted: int) -> None:
    with pytest.raises(RequestError, match=r"max_tokens must be in \[1, 100\]") as caught:
        answer_length(request(max_tokens=wanted), 10, limits())
    assert ("0 is for completions with echo" in caught.value.message) == (wanted == 0)
    assert answer_length(request(max_tokens=0, echo=True), 10, limits()) == 0
    with pytest.raises(RequestError, match=r"length, got \S+\.$"):
        answer_length(ChatCompletionRequest(messages=MESSAGES, max_tokens=wanted), 10, limits())


@pytest.mark.parametrize(
    ("own", "server", "allowed"),
    [(None, None, None), (5, None, 5), (None, 7, 7), (5, 7, 5), (9, 7, 7)],
)
def test_time_is_the_shorter_of_the_requests_and_the_servers(own, server, allowed) -> None:
    assert time_allowed(request(timeout=own), limits(request_timeout=server)) == allowed


@pytest.mark.parametrize("fields", [{"policy": "random"}, {"policy": "entropy", "alg_temp": 0.5}])
def test_several_answers_at_temperature_0_need_another_draw_than_of_tokens(fields) -> None:
    check(request(n=2, temperature=0, **fields), limits())
    with pytest.raises(RequestError, match="n must be 1"):
        check(request(n=2, temperature=0), limits())


def test_several_answers_at_temperature_0_may_begin_from_random_tokens() -> None:
    traits = replace(limits().traits, renoises=True)
    check(request(n=2, temperature=0), limits(traits=traits))
