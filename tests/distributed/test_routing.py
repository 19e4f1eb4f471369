"""How much work a request is, and which replica remembers its beginning."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.tiny import tiny_decoder, tiny_spec
from vdiff_kserve.distributed.routing import PrefixMemory, denoising_work, prompt_prefixes
from vdiff_kserve.engine import GenerationRequest
from vdiff_kserve.sampler import DecodingParams

SPEC = tiny_spec(tiny_decoder())
CAUSAL = replace(SPEC, decoder=replace(SPEC.decoder, attention_block=4), block_length=4)


def request(prompt: int = 10, answer: int = 32, **decoding: object) -> GenerationRequest:
    params = DecodingParams(**({"block_length": 8} | decoding))
    return GenerationRequest(tuple(range(prompt)), answer, params)


def test_without_a_cache_every_step_is_a_pass_over_the_canvas() -> None:
    assert denoising_work(request(), SPEC) == 32 * 42
    assert denoising_work(request(steps=8), SPEC) == 8 * 42
    assert denoising_work(request(cfg_scale=1.0), SPEC) == 2 * 32 * 42


def test_caches_leave_a_pass_per_block() -> None:
    dual = denoising_work(request(cache="dual"), SPEC)
    assert dual == 4 * 42 + 28 * 8
    prefix = denoising_work(request(cache="prefix"), SPEC)
    assert dual < prefix < denoising_work(request(), SPEC)


def test_block_causal_models_read_the_prompt_once() -> None:
    one = denoising_work(request(prompt=1000, cache="exact"), CAUSAL)
    two = denoising_work(request(prompt=2000, cache="exact"), CAUSAL)
    assert two - one == 1000


@pytest.mark.parametrize("policy", ["threshold", "apd", "credit"])
def test_policies_by_confidence_are_guessed_to_be_faster(policy: str) -> None:
    assert denoising_work(request(policy=policy), SPEC) < denoising_work(request(), SPEC)


def test_longer_answers_are_more_work() -> None:
    works = [denoising_work(request(answer=n), SPEC) for n in (1, 8, 9, 64, 512)]
    assert works == sorted(works)


def test_prefixes_are_of_whole_blocks_and_of_models_that_reuse_them() -> None:
    exact = request(prompt=10, cache="exact")
    assert len(prompt_prefixes(exact, CAUSAL)) == 2
    assert prompt_prefixes(exact, SPEC) == ()
    assert prompt_prefixes(request(), CAUSAL) == ()


def test_a_replica_remembers_beginnings() -> None:
    memory = PrefixMemory(limit=4)
    a, b, c, d, e = (bytes([i]) for i in range(5))
    memory.add([a, b, c])
    assert memory.blocks_known([a, b, d]) == 2
    assert memory.blocks_known([d, a]) == 0
    memory.add([a, d, e])
    assert memory.blocks_known([a]) == 1
    assert memory.blocks_known([b]) == 0
