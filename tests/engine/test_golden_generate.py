"""The engine writes what the published decoding loops write, in as many forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.engine.reference_rows import (
    CarryOverRow,
    EveryStepRow,
    FastDllmDreamRow,
    FastDllmMainRow,
    FastDllmOrigRow,
    FastDllmV2Row,
    InfillRow,
    engine_of,
    lockstep_passes,
)
from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.row_kinds import ApdRow, BlockCausalRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import load_causal_decoder, load_decoder
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
    auxiliary = load_causal_decoder(GOLDEN_DIR / family / "ar") if family == "apd" else None
    if family == "llada":
        case = golden_cases("llada", "generate", "gsai")[0]
        spec = replace(spec, eot_token_id=case.params["eot_id"])
    engine = engine_of(row_class)(decoder, spec, EngineConfig(max_num_seqs=4), auxiliary)
    engine.start()
    yield engine
    engine.stop()


def generate(
    case: GoldenCase, decoding: DecodingParams, row_class: type[Row]
) -> tuple[list[GenerationResult], list[Row]]:
    """The results of the case's prompts and the rows that recorded how they came about."""
    length = case.params.get("gen_length", case.params.get("max_new_tokens"))
    with engine_for(case.family, row_class) as engine:
        results = engine.generate(
            [GenerationRequest(tuple(prompt), length, decoding) for prompt in case.prompts()]
        )
        return results, engine.rows


def llada_decoding(case: GoldenCase) -> DecodingParams:
    params = case.params
    policy = params["remasking"]
    for name in ("threshold", "factor"):
        policy = name if params.get(name) is not None else policy
    return DecodingParams(
        policy=policy,
        steps=params["steps"],
        block_length=params["block_length"],
        temperature=params["temperature"],
        threshold=params.get("threshold") or 0.9,
        factor=params.get("factor") or 1.0,
        cfg_scale=params.get("cfg_scale", 0.0),
        logits_eos_inf=params.get("logits_eos_inf", False),
        confidence_eos_eot_inf=params.get("confidence_eos_eot_inf", False),
        cache=CACHES[params.get("function", "generate")],
    )


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_gsai(case: GoldenCase) -> None:
    results, _ = generate(case, llada_decoding(case), EveryStepRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_without_idle_steps(case: GoldenCase) -> None:
    """The engine's own rows write the same, in no more passes than there are tokens."""
    results, _ = generate(case, llada_decoding(case), Row)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {min(case.nfe, case.params["gen_length"])}


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "fd"), ids=lambda case: case.name
)
def test_golden_llada_fast_dllm(case: GoldenCase) -> None:
    results, rows = generate(case, llada_decoding(case), FAST_DLLM_ROWS[case.params["variant"]])
    assert [list(result.token_ids) for result in results] == case.answers()
    assert lockstep_passes(rows) == case.nfe


def dream_decoding(case: GoldenCase) -> DecodingParams:
    params = case.params
    return DecodingParams(
        policy=params["alg"] if params["alg"] != "confidence_threshold" else "threshold",
        steps=params["steps"],
        block_length=params.get("block_length", params["max_new_tokens"]),
        threshold=params.get("threshold", 0.9),
        cache=CACHE_OF_DUAL[params.get("dual_cache")],
    )


CACHE_OF_DUAL = {None: "none", False: "prefix", True: "dual"}


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in golden_cases("dream", "generate")
        if not case.name.startswith("fd_") and case.name != "entropy_infill"
    ],
    ids=lambda case: case.name,
)
def test_golden_dream_diffusion_generate(case: GoldenCase) -> None:
    results, _ = generate(case, dream_decoding(case), EveryStepRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


def test_golden_dream_infill() -> None:
    (case,) = golden_cases("dream", "generate", "entropy_infill")
    results, rows = generate(case, dream_decoding(case), InfillRow)
    assert rows[0].canvas.tolist() == case.tensor("output_ids")[0].tolist()
    assert results[0].stats.nfe == case.nfe


@pytest.mark.parametrize(
    "case", golden_cases("dream", "generate", "fd_nocache"), ids=lambda case: case.name
)
def test_golden_dream_fast_dllm_without_cache(case: GoldenCase) -> None:
    decoding = replace(dream_decoding(case), policy="apd", apd_threshold=case.params["threshold"])
    results, _ = generate(case, decoding, CarryOverRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


@pytest.mark.parametrize(
    "case",
    [
        *golden_cases("dream", "generate", "fd_prefix"),
        *golden_cases("dream", "generate", "fd_dual"),
    ],
    ids=lambda case: case.name,
)
def test_golden_dream_fast_dllm_block_cache(case: GoldenCase) -> None:
    results, _ = generate(case, dream_decoding(case), FastDllmDreamRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


@pytest.mark.parametrize("case", golden_cases("apd", "generate"), ids=lambda case: case.name)
def test_golden_apd(case: GoldenCase) -> None:
    params = case.params
    left_to_right = params["alg"] == "leftright"
    decoding = DecodingParams(
        policy="apd",
        apd_mixture_weight=1.0 if left_to_right else params["R"],
        apd_window=params["W"],
        apd_lookahead=params["M"],
        apd_max_parallel=params["tokens_per_step"] if left_to_right else params["max_new_tokens"],
    )
    with engine_for("apd", ApdRow) as engine:
        request = GenerationRequest(
            tuple(case.prompts()[0]),
            params["max_new_tokens"],
            decoding,
            (engine.spec.eos_token_id,),
        )
        (result,) = engine.generate([request])
        counts = [accepted for _, accepted in engine.rows[0].commits]
    expected = case.answers()[0][: case.fields["num_tokens_generated"]]
    if engine.spec.eos_token_id in expected:
        expected = expected[: expected.index(engine.spec.eos_token_id)]
    assert list(result.token_ids) == expected
    assert counts == case.tensor("acceptance_counts").tolist()
    assert result.stats.nfe == case.nfe


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in golden_cases("sdar", "generate", "static")
        if case.tensor("prompt_ids").shape[1] % case.params["block_length"] == 0
    ],
    ids=lambda case: case.name,
)
def test_golden_sdar_static(case: GoldenCase, cache: str) -> None:
    """With the exact cache: one pass per step, the finished blocks' keys and values included."""
    params = case.params
    block, steps = params["block_length"], params["denoising_steps"]
    decoder, spec = load_decoder(GOLDEN_DIR / "sdar")
    for layer in decoder.layers:
        layer.attention.attention_block = block
    spec = replace(spec, decoder=replace(spec.decoder, attention_block=block), block_length=block)
    length = len(case.answers()[0])
    decoding = DecodingParams(steps=steps * length // block, block_length=block, cache=cache)
    engine = engine_of(BlockCausalRow)(decoder, spec, EngineConfig(max_num_seqs=1))
    engine.start()
    (result,) = engine.generate([GenerationRequest(tuple(case.prompts()[0]), length, decoding)])
    engine.stop()
    assert list(result.token_ids) == case.answers()[0]
    assert result.stats.nfe == steps * length // block
    assert result.stats.commits == (length // block - 1 if cache == "exact" else 0)


@pytest.mark.parametrize("row_class", [FastDllmV2Row, SubBlockRow])
@pytest.mark.parametrize(
    "case", golden_cases("fast_dllm_v2", "generate"), ids=lambda case: case.name
)
def test_golden_fast_dllm_v2(case: GoldenCase, row_class: type[Row]) -> None:
    """The engine's own rows write the same, and spend no pass on the prompt's whole blocks alone
    when their last one does not predict the first token."""
    params = case.params
    block, prompt, answer = params["block_size"], case.prompts()[0], case.answers()[0]
    decoder, spec = load_decoder(GOLDEN_DIR / "fast_dllm_v2")
    for layer in decoder.layers:
        layer.attention.attention_block = block
    spec = replace(spec, decoder=replace(spec.decoder, attention_block=block), block_length=block)
    decoding = DecodingParams(
        policy="threshold",
        threshold=params["threshold"],
        strict_threshold=True,
        block_length=params["small_block_size"],
        cache="dual" if params["use_block_cache"] else "exact",
    )
    stop = params["stop_token"]
    engine = engine_of(row_class)(decoder, spec, EngineConfig(max_num_seqs=1))
    engine.start()
    (result,) = engine.generate([GenerationRequest(tuple(prompt), len(answer), decoding, (stop,))])
    engine.stop()
    assert [*result.token_ids, *([stop] if result.finish_reason == "stop" else [])] == answer
    prefill = row_class is not FastDllmV2Row and len(prompt) > block and len(prompt) % block > 0
    assert result.stats.nfe == case.nfe - prefill
