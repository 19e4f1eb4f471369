"""The engine writes what the published decoding loops write, in as many forward passes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import load_decoder
from vdiff_kserve.sampler import DecodingParams


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    decoder, spec = load_decoder(GOLDEN_DIR / "llada")
    eot = golden_cases("llada", "generate", "gsai")[0].params["eot_id"]
    engine = Engine(decoder, replace(spec, eot_token_id=eot), EngineConfig(max_num_seqs=4))
    engine.start()
    yield engine
    engine.stop()


def gsai_requests(case: GoldenCase) -> list[GenerationRequest]:
    params = case.params
    decoding = DecodingParams(
        steps=params["steps"],
        block_length=params["block_length"],
        temperature=params["temperature"],
        remasking=params["remasking"],
        cfg_scale=params["cfg_scale"],
        logits_eos_inf=params.get("logits_eos_inf", False),
        confidence_eos_eot_inf=params.get("confidence_eos_eot_inf", False),
        idle_steps=True,
    )
    return [
        GenerationRequest(tuple(prompt), params["gen_length"], decoding)
        for prompt in case.prompts()
    ]


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_gsai(engine: Engine, case: GoldenCase) -> None:
    results = engine.generate(gsai_requests(case))
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}
