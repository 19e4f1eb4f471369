"""What a request's decoding fields come to, and which contradictions are refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from vdiff_kserve.decoding import CACHES, DECODING_FIELDS, POLICIES, PROFILES, SCHEDULED
from vdiff_kserve.models import fast_dllm, llada, llada_moe, qwen, sdar
from vdiff_kserve.models.registry import FAMILIES
from vdiff_kserve.openai.decoding import POLICY_OF_FIELD, ModelTraits, report, resolve
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.protocol import CompletionRequest
from vdiff_kserve.sampler import SCHEDULED_POLICIES, CacheMode, DecodingParams, Policy

BIDIRECTIONAL = ModelTraits(block_causal=False, block_length=32, has_auxiliary=True)
BLOCK_CAUSAL = ModelTraits(block_causal=True, block_length=4, has_auxiliary=False)
SUB_BLOCKS = replace(BLOCK_CAUSAL, block_length=32, sub_blocks=True)
AUTOREGRESSIVE = replace(BLOCK_CAUSAL, block_length=1, autoregressive=True)
RENOISING = replace(BLOCK_CAUSAL, block_length=256, renoises=True)
EXACT = DecodingParams()
FAST = DecodingParams(policy="threshold", threshold=0.8, cache="dual", max_lookahead=64)
PROFILE_PARAMS = {"exact": EXACT, "fast": FAST}


def decode(
    default: DecodingParams = EXACT, traits: ModelTraits = BIDIRECTIONAL, **given: Any
) -> DecodingParams:
    return resolve(given, default, PROFILE_PARAMS, traits)


def refusal(
    default: DecodingParams = EXACT, traits: ModelTraits = BIDIRECTIONAL, **given: Any
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode(default, traits, **given)
    assert caught.value.status == 400
    return caught.value


def test_the_table_knows_every_policy_and_cache_of_the_sampler() -> None:
    assert set(POLICIES) == set(get_args(Policy))
    assert set(CACHES) == set(get_args(CacheMode))
    assert set(SCHEDULED) == SCHEDULED_POLICIES


def test_the_page_tells_which_policy_every_field_chooses() -> None:
    page = (Path(__file__).parents[2] / "docs/decoding.md").read_text(encoding="utf-8")
    table = page.split("| field | chooses |\n|---|---|\n")[1].split("\n\n")[0]
    told = {}
    for line in table.splitlines():
        names, chosen = line.strip("|").split(" | ")
        for name in names.replace("`", "").replace(" ", "").split(","):
            told[name] = (
                name if chosen.startswith("the policy of that name") else chosen.split("`")[1]
            )
    assert told.pop("steps") == decode(FAST, steps=4, cache="none").policy
    assert told.pop("alg_temp") == "policy"
    assert refusal(alg_temp=0.5).param == "alg_temp"
    assert told == POLICY_OF_FIELD


@pytest.mark.parametrize("traits", [BIDIRECTIONAL, AUTOREGRESSIVE, RENOISING])
def test_vllms_top_k_of_minus_one_is_all_tokens(traits: ModelTraits) -> None:
    default = DecodingParams(top_k=5, block_length=traits.block_length, cache="none")
    if traits.renoises:
        default = replace(default, policy="entropy_bound")
    assert decode(default, traits, top_k=-1).top_k == 0
    assert refusal(default, traits, top_k=-2).message == (
        "top_k must be an integer of at least -1, got -2."
    )


def test_every_decoding_parameter_is_a_field_of_requests() -> None:
    apart = {
        *("logits_eos_inf", "confidence_eos_eot_inf", "seed"),
        *("constraints", "top_logprobs"),  # made of several fields each
        *("strict_threshold", "filtered_confidence"),  # a family's own, see its profiles
    }
    assert {f.name for f in fields(DecodingParams)} - apart == DECODING_FIELDS.keys()
    assert DECODING_FIELDS.keys() <= CompletionRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("profiles", "traits"),
    [
        (llada.PROFILES, BIDIRECTIONAL),
        (qwen.DREAM_PROFILES, BIDIRECTIONAL),
        (sdar.PROFILES, replace(BLOCK_CAUSAL, block_length=32)),
        (llada_moe.LLADA2_PROFILES, replace(BLOCK_CAUSAL, block_length=32)),
        (llada_moe.EDITING_PROFILES, replace(BLOCK_CAUSAL, block_length=32)),
        (fast_dllm.PROFILES, SUB_BLOCKS),
    ],
)
def test_every_family_has_the_profiles_and_they_are_valid(
    profiles: Any, traits: ModelTraits
) -> None:
    assert tuple(profiles) == PROFILES
    for changes in profiles.values():
        params = DecodingParams(**changes)
        assert resolve({}, params, {}, traits) == params
    assert len(FAMILIES) >= 3


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "low_confidence"),
        ({"policy": "entropy"}, "entropy"),
        ({"remasking": "random"}, "random"),
        ({"threshold": 0.7}, "threshold"),
        ({"threshold": 0.7, "remasking": "low_confidence"}, "threshold"),
        ({"threshold": 0.7, "policy": "local"}, "local"),
        ({"factor": 1.0}, "factor"),
        ({"entropy_bound": 0.2}, "entropy_bound"),
        ({"radius": 2}, "local"),
        ({"credit_decay": 0.5}, "credit"),
        ({"edit_threshold": 0.5}, "edit"),
        ({"apd": True}, "apd"),
        ({"apd_window": 4}, "apd"),
        ({"apd": False}, "low_confidence"),
    ],
)
def test_the_policy_is_named_or_follows_from_a_field(given: dict[str, Any], policy: str) -> None:
    assert decode(**given).policy == policy


def test_steps_choose_a_schedule_where_the_default_has_none() -> None:
    assert decode(FAST, steps=4).policy == "low_confidence"
    assert decode(replace(EXACT, policy="entropy"), steps=4).policy == "entropy"


def test_apd_false_leaves_apd() -> None:
    assert decode(replace(EXACT, policy="apd"), apd=False).policy == "threshold"


@pytest.mark.parametrize(
    ("given", "cache"),
    [
        ({"cache": "dual"}, "dual"),
        ({"use_cache": True}, "prefix"),
        ({"use_cache": False}, "none"),
        ({"use_dual_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": False}, "prefix"),
    ],
)
def test_the_cache_has_the_names_of_fast_dllm_too(given: dict[str, Any], cache: str) -> None:
    assert decode(**given).cache == cache


def test_a_profile_is_the_base_that_other_fields_change() -> None:
    assert decode(profile="fast") == FAST
    assert decode(profile="fast", threshold=0.7, cache="none") == replace(
        FAST, threshold=0.7, cache="none"
    )


def test_null_means_all_where_a_field_says_so_and_absent_elsewhere() -> None:
    assert decode(FAST, max_lookahead=None).max_lookahead is None
    assert decode(FAST, threshold=None) == FAST


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"policy": "beam"}, "policy", "low_confidence"),
        ({"profile": "best"}, "profile", "exact, fast"),
        ({"factor": 1.0, "policy": "low_confidence"}, "factor", "belongs to policy factor"),
        ({"steps": 4, "policy": "threshold"}, "steps", "low_confidence"),
        ({"threshold": 1.5}, "threshold", "at most 1"),
        ({"threshold": 0}, "threshold", "above 0"),
        ({"block_length": 0}, "block_length", "at least 1"),
        ({"block_length": True}, "block_length", "an integer"),
        ({"steps": 0}, "steps", "at least 1"),
        ({"temperature": 2.5}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"threshold": 0.5, "factor": 1.0}, "factor", "several policies"),
        ({"threshold": 0.5, "remasking": "random"}, "threshold", "belongs to policy"),
        ({"policy": "threshold", "apd": True}, "apd", "several policies"),
        ({"policy": "apd", "apd": False}, "apd", "apd is false"),
        ({"cache": "exact"}, "cache", "none, prefix, dual for a bidirectional model"),
        ({"cache": "dual", "use_cache": True}, "use_cache", "several caches"),
        ({"use_cache": False, "use_dual_cache": True}, "use_dual_cache", "use_cache is false"),
        ({"refresh_interval": 2}, "refresh_interval", "needs cache prefix or dual"),
        ({"vicinity": 2, "cache": "none"}, "vicinity", "needs cache prefix or dual"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**given)
    assert error.response.error.param == param
    assert words in error.response.error.message


def test_a_block_causal_model_has_its_own_cache_and_block_length() -> None:
    default = replace(EXACT, block_length=4, cache="exact")
    assert decode(default, BLOCK_CAUSAL, block_length=4).cache == "exact"
    assert "trained with" in str(refusal(default, BLOCK_CAUSAL, block_length=8))
    assert "none, exact" in str(refusal(default, BLOCK_CAUSAL, cache="dual"))
    assert "bidirectional" in str(refusal(default, BLOCK_CAUSAL, max_lookahead=8))


def test_a_model_with_smaller_blocks_decodes_in_any_that_fit_its_own() -> None:
    default = replace(EXACT, cache="exact", block_length=8)
    assert decode(default, SUB_BLOCKS, block_length=16, cache="dual").block_length == 16
    assert decode(default, SUB_BLOCKS, cache="dual", vicinity=2).vicinity == 2
    assert "divide 32" in str(refusal(default, SUB_BLOCKS, block_length=12))
    assert "none, exact, dual" in str(refusal(default, SUB_BLOCKS, cache="prefix"))
    assert refusal(default, SUB_BLOCKS, policy="edit").response.error.param == "policy"
    assert refusal(default, SUB_BLOCKS, policy="p2").response.error.param == "policy"


@pytest.mark.parametrize(
    "given",
    [
        {"threshold": 0.8},
        {"policy": "entropy"},
        {"steps": 4},
        {"block_length": 1},
        {"cfg_scale": 1.0},
        {"profile": "fast"},
        {"apd": True},
        {"max_lookahead": 8},
    ],
)
def test_an_autoregressive_model_refuses_what_only_diffusion_has(given: dict[str, Any]) -> None:
    error = refusal(traits=AUTOREGRESSIVE, **given)
    assert error.response.error.param == next(iter(given))
    assert "autoregressive" in str(error)


def test_an_autoregressive_model_samples_and_caches() -> None:
    default = DecodingParams(block_length=1, cache="exact")
    params = decode(default, AUTOREGRESSIVE, temperature=0.7, top_p=0.9, top_k=4, apd=False)
    assert params == replace(default, temperature=0.7, top_p=0.9, top_k=4)
    assert decode(default, AUTOREGRESSIVE, use_cache=False).cache == "none"
    assert decode(default, AUTOREGRESSIVE, use_cache=True).cache == "exact"
    assert "none, exact" in str(refusal(default, AUTOREGRESSIVE, cache="dual"))
    assert refusal(default, AUTOREGRESSIVE, temperature=-1.0).response.error.param == "temperature"
    uncached = replace(AUTOREGRESSIVE, cacheable=False)
    default = replace(default, cache="none")
    assert "one of none for" in str(refusal(default, uncached, cache="exact"))
    assert report(params, 16, AUTOREGRESSIVE) == {
        "policy": "autoregressive",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.0,
        "cache": "exact",
        "max_tokens": 16,
        "seed": 0,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"threshold": 0.8},
        {"policy": "threshold"},
        {"cache": "exact"},
        {"use_cache": True},
        {"block_length": 32},
        {"cfg_scale": 1.0},
        {"alg_temp": 0.5},
        {"apd": True},
        {"remasking": "random"},
        {"max_lookahead": 8},
        {"entropy_bound": -1.0},
    ],
)
def test_a_model_without_masks_refuses_what_does_not_apply(given: dict[str, Any]) -> None:
    error = refusal(traits=RENOISING, **given)
    assert error.response.error.param == next(iter(given))


def test_a_model_without_masks_takes_steps_and_an_entropy_bound() -> None:
    default = DecodingParams("entropy_bound", block_length=256, temperature=1.0, cache="exact")
    params = decode(default, RENOISING, steps=24, entropy_bound=0.4, policy="entropy_bound")
    assert params == replace(default, steps=24, entropy_bound=0.4)
    assert decode(default, RENOISING, temperature=0.0, apd=False).temperature == 0
    assert report(params, 300, RENOISING) == {
        "policy": "entropy_bound",
        "steps": 24,
        "block_length": 256,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "entropy_bound": 0.4,
        "max_tokens": 300,
        "seed": 0,
    }


def test_a_server_without_apd_refuses_it() -> None:
    traits = replace(BIDIRECTIONAL, allows_apd=False)
    assert "--disable_apd" in str(refusal(traits=traits, apd=True))


def test_the_report_names_what_the_policy_used_and_nothing_else() -> None:
    scheduled = report(EXACT, 24, BIDIRECTIONAL)
    assert scheduled["steps"] == 24
    assert not scheduled.keys() & {"threshold", "factor", "apd_window", "vicinity"}
    cached = report(FAST, 24, BIDIRECTIONAL)
    assert (cached["threshold"], cached["cache"], cached["vicinity"]) == (0.8, "dual", 0)
    assert "steps" not in cached
    assert report(replace(EXACT, policy="apd"), 8, BIDIRECTIONAL)["verifier"] == "auxiliary model"
