"""The engine writes what the published decoding loops write, in as many forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.device import TEST_DEVICE
from tests.engine.reference_rows import (
    CarryOverRow,
    EveryStepRow,
    FastDllmDreamRow,
    FastDllmMainRow,
    FastDllmOrigRow,
    FastDllmV2Row,
    InfillRow,
    SdarRow,
    WholeBlocksRow,
    WholeCanvasRow,
    engine_of,
    lockstep_passes,
)
from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.row_kinds import ApdRow, BlockCausalRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import Hints, load_causal_decoder, load_decoder
from vdiff_kserve.sampler import DecodingParams, block_steps
from vdiff_kserve.sampler.params import CacheMode, Policy

CACHES = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}
FAST_DLLM_ROWS = {"orig": FastDllmOrigRow, "main": FastDllmMainRow}


@contextmanager
def engine_for(
    family: str, row_class: type[Row], block_length: int | None = None
) -> Iterator[Engine]:
    decoder, spec = load_decoder(
        GOLDEN_DIR / family, TEST_DEVICE, hints=Hints(block_length=block_length)
    )
    auxiliary = (
        load_causal_decoder(GOLDEN_DIR / family / "ar", TEST_DEVICE) if family == "apd" else None
    )
    if family in ("llada", "llada_moe"):
        case = golden_cases(family, "generate", "gsai")[0]
        spec = replace(spec, eot_token_id=case.params["eot_id"])
    engine = engine_of(row_class)(decoder, spec, EngineConfig(max_num_seqs=4), auxiliary)
    engine.start()
    yield engine
    engine.stop()


def generate(
    case: GoldenCase, decoding: DecodingParams, row_class: type[Row]
) -> tuple[list[GenerationResult], list[Row]]:
    """The results of the case's prompts and the rows that recorded how they came about."""
    if case.params.get("confidence_eos_eot_inf") and TEST_DEVICE.type != "cpu":
        pytest.skip("of equals it takes those that topk does, which on a GPU are others")
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


def check_gsai(case: GoldenCase) -> None:
    results, _ = generate(case, llada_decoding(case), EveryStepRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


def check_without_idle_steps(case: GoldenCase) -> None:
    """The engine's own rows write the same, in no more passes than there are tokens."""
    results, _ = generate(case, llada_decoding(case), Row)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {min(case.nfe, case.params["gen_length"])}


def check_fast_dllm(case: GoldenCase) -> None:
    results, rows = generate(case, llada_decoding(case), FAST_DLLM_ROWS[case.params["variant"]])
    assert [list(result.token_ids) for result in results] == case.answers()
    assert lockstep_passes(rows) == case.nfe


@pytest.mark.parametrize("check", [check_gsai, check_without_idle_steps])
@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_gsai(case: GoldenCase, check: Callable[[GoldenCase], None]) -> None:
    check(case)


@pytest.mark.parametrize("check", [check_gsai, check_without_idle_steps])
@pytest.mark.parametrize(
    "case", golden_cases("llada_moe", "generate", "gsai"), ids=lambda case: case.name
)
def test_golden_llada_moe_gsai(case: GoldenCase, check: Callable[[GoldenCase], None]) -> None:
    check(case)


@pytest.mark.parametrize(
    "case", golden_cases("llada", "generate", "fd"), ids=lambda case: case.name
)
def test_golden_llada_fast_dllm(case: GoldenCase) -> None:
    check_fast_dllm(case)


@pytest.mark.parametrize(
    "case", golden_cases("llada_moe", "generate", "fd"), ids=lambda case: case.name
)
def test_golden_llada_moe_fast_dllm(case: GoldenCase) -> None:
    check_fast_dllm(case)


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
        if not case.name.startswith("fd_") and "infill" not in case.name
    ],
    ids=lambda case: case.name,
)
def test_golden_dream_diffusion_generate(case: GoldenCase) -> None:
    results, _ = generate(case, dream_decoding(case), EveryStepRow)
    assert [list(result.token_ids) for result in results] == case.answers()
    assert {result.stats.nfe for result in results} == {case.nfe}


@pytest.mark.parametrize(
    "case",
    [case for case in golden_cases("dream", "generate") if "infill" in case.name],
    ids=lambda case: case.name,
)
def test_golden_dream_infill(case: GoldenCase) -> None:
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


def whole_canvas_steps(case: GoldenCase, steps_per_block: int) -> int:
    """What `steps` of the whole answer gives each of its blocks as many as the reference has."""
    block, prompt = case.params["block_length"], len(case.prompts()[0])
    masks = -(-(prompt + case.params["gen_length"]) // block) * block - prompt
    for steps in range(1, steps_per_block * masks + 1):
        if block_steps(DecodingParams(steps=steps), masks, block) == steps_per_block:
            return steps
    pytest.skip("no number of steps of the answer gives its only block, part of it, so many")


def generate_blocks(
    case: GoldenCase, decoding: DecodingParams, row_class: type[Row], end_token_ids: tuple[int, ...]
) -> tuple[GenerationResult, Row]:
    """The result of the case's one prompt, and its row."""
    with engine_for(case.family, row_class, case.params["block_length"]) as engine:
        request = GenerationRequest(
            tuple(case.prompts()[0]), case.params["gen_length"], decoding, end_token_ids
        )
        (result,) = engine.generate([request])
        return result, engine.rows[0]


def llada2_decoding(case: GoldenCase, cache: CacheMode) -> DecodingParams:
    params = case.params
    steps = min(params["steps"], params["gen_length"] // params.get("minimal_topk", 1))
    return DecodingParams(
        policy="dynamic",
        threshold=params["threshold"],
        steps=whole_canvas_steps(case, steps),
        block_length=params["block_length"],
        cache=cache,
    )


@pytest.mark.parametrize(("own_rows", "cache"), [(False, "none"), (True, "exact")])
@pytest.mark.parametrize(
    "case", golden_cases("llada2", "generate"), ids=lambda case: f"llada2-{case.name}"
)
def test_golden_llada2(case: GoldenCase, own_rows: bool, cache: CacheMode) -> None:
    """The engine's own rows write the same in no more passes, with the cache that it lacks."""
    reference = WholeCanvasRow if case.params.get("eos_early_stop") else WholeBlocksRow
    eos = case.params["eos_id"]
    decoding = llada2_decoding(case, cache)
    row_class = BlockCausalRow if own_rows else reference
    result, _ = generate_blocks(case, decoding, row_class, (eos,))
    end = [eos] if result.finish_reason == "stop" else []
    assert [*result.token_ids, *end] == case.tensor("output_ids")[0].tolist()
    assert result.stats.nfe <= case.nfe if own_rows else result.stats.nfe == case.nfe


SDAR_POLICIES: dict[str, Policy] = {
    "low_confidence_static": "low_confidence",
    "low_confidence_dynamic": "dynamic",
    "sequential": "sequential",
}


def sdar_decoding(case: GoldenCase, cache: CacheMode) -> DecodingParams:
    params = case.params
    return DecodingParams(
        policy=SDAR_POLICIES[params["remasking_strategy"]],
        threshold=params.get("confidence_threshold", 0.9),
        steps=whole_canvas_steps(case, params["denoising_steps"]),
        block_length=params["block_length"],
        cache=cache,
    )


@pytest.mark.parametrize(
    "case", golden_cases("sdar", "generate"), ids=lambda case: f"sdar-{case.name}"
)
def test_golden_sdar(case: GoldenCase) -> None:
    stop = tuple(case.params.get("stopping_criteria_idx", ()))
    result, row = generate_blocks(case, sdar_decoding(case, "exact"), SdarRow, stop)
    assert row.canvas.tolist() == case.tensor("output_ids")[0].tolist()
    assert result.stats.nfe == case.nfe


@pytest.mark.parametrize(
    "case", golden_cases("sdar", "generate"), ids=lambda case: f"sdar-{case.name}"
)
def test_golden_sdar_without_separate_passes(case: GoldenCase) -> None:
    """The engine computes keys and values of prompt and finished blocks along with other passes."""
    params, block = case.params, case.params["block_length"]
    prompt_length = len(case.prompts()[0])
    stop = tuple(params.get("stopping_criteria_idx", ()))
    result, row = generate_blocks(case, sdar_decoding(case, "exact"), BlockCausalRow, stop)
    expected = case.answers()[0][: params["gen_length"]]
    end = list(stop) if result.finish_reason == "stop" else []
    written = [*result.token_ids, *end]
    assert written == expected[: len(written)]
    assert result.finish_reason == "stop" or len(written) == params["gen_length"]
    finished = row.block_end // block - prompt_length // block
    assert result.stats.nfe <= case.nfe - finished - (prompt_length >= block)
    assert result.stats.commits == finished - 1


@pytest.mark.parametrize("row_class", [FastDllmV2Row, SubBlockRow])
@pytest.mark.parametrize(
    "case", golden_cases("fast_dllm_v2", "generate"), ids=lambda case: case.name
)
def test_golden_fast_dllm_v2(case: GoldenCase, row_class: type[Row]) -> None:
    """The engine's own rows write the same, and spend no pass on the prompt's whole blocks alone
    when their last one does not predict the first token."""
    params = case.params
    block, prompt, answer = params["block_size"], case.prompts()[0], case.answers()[0]
    decoder, spec = load_decoder(GOLDEN_DIR / "fast_dllm_v2", TEST_DEVICE)
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
