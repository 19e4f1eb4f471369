"""The engine writes what the published decoding loops write, in as many forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.engine.reference_rows import FastDllmMainRow, FastDllmOrigRow, GsaiRow, engine_of
from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.engine.row import Row
from vdiff_kserve.models import load_decoder
from vdiff_kserve.sampler import DecodingParams

CACHES = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}
FAST_DLLM_ROWS = {"orig": FastDllmOrigRow, "main": FastDllmMainRow}


@contextmanager
def engine_for(family: str, row_class: type[Row]) -> Iterator[Engine]:
    decoder, spec = load_decoder(GOLDEN_DIR / family)
    if family == "llada":
        case = golden_cases("llada", "generate", "gsai")[0]
        spec = replace(spec, eot_token_id=case.params["eot_id"])
    engine = engine_of(row_class)(decoder, spec, EngineConfig(max_num_seqs=4))
    engine.start()
    yield engine
    engine.stop()


def generate(
    case: GoldenCase, decoding: DecodingParams, row_class: type[Row]
) -> list[GenerationResult]:
    length = case.params.get("gen_length", case.params.get("max_new_tokens"))
    with engine_for(case.family, row_class) as engine:
        return engine.generate(
            [GenerationRequest(tuple(prompt), length, decoding) for prompt in case.prompts()]
        )


def llada_decoding(case: GoldenCase) -> DecodingParams:
    params = case.params
    return DecodingParams(
        steps=params["steps"],
        block_length=params["block_length"],
        temperature=params["temperature"],
        remasking=params["remasking"],
        threshold=params.get("threshold"),
        cfg_scale=params.get("cfg_scale", 0.0),
        logits_eos_inf=params.get("logits_eos_inf", False),
        confidence_eos_eot_inf=params.get("confidence_eos_eot_inf", False),
        cache=CACHES[params.get("function", "generate")],
    )


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_gsai(case: GoldenCase) -> None:
    results = generate(case, llada_decoding(case), GsaiRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "fd"), ids=lambda case: case.name
)
def test_golden_llada_fast_dllm(case: GoldenCase) -> None:
    results = generate(case, llada_decoding(case), FAST_DLLM_ROWS[case.params["variant"]])
    assert [list(result.token_ids) for result in results] == case.answers()
    assert max(result.stats.nfe for result in results) == case.nfe
