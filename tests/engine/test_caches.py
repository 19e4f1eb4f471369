"""Caches: exactly the uncached result where they promise it, and one step's freshness otherwise."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny import (
    generate,
    request_of,
    running,
    tiny_auxiliary,
    tiny_decoder,
    tiny_spec,
)
from tests.waiting import wait_until
from vdiff_kserve.engine import EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.models import Decoder
from vdiff_kserve.sampler import Policy

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")

POLICIES: tuple[Policy, ...] = get_args(Policy)
DECODER = tiny_decoder()
BLOCK_CAUSAL = tiny_decoder(attention_block=8).double()
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": dict(temperature=0.9, seed=3),
    "guided": dict(cfg_scale=1.2),
    "short steps": dict(steps=7),
}


def one(request: GenerationRequest, decoder: Decoder = DECODER, **kind: Any) -> GenerationResult:
    return generate(decoder, request, **kind)[0]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("decoding", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_refresh_at_every_step_equals_no_cache(
    cache: str, policy: Policy, decoding: dict[str, Any], shifted: bool
) -> None:
    decoding = dict(policy=policy, threshold=0.6, edit_threshold=0.7, max_tokens=20) | decoding
    expected = one(request_of(**decoding), shifted=shifted)
    cached = one(request_of(**decoding, cache=cache, refresh_interval=1), shifted=shifted)
    assert cached == expected
    assert cached.stats.reuses == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_vicinity_over_the_whole_canvas_equals_no_cache(cache: str) -> None:
    expected = one(request_of(max_tokens=24))
    assert one(request_of(max_tokens=24, cache=cache, vicinity=50)) == expected


def test_dual_that_recomputes_all_to_the_right_equals_prefix() -> None:
    prompt = tuple(range(30))
    decoding = dict(prompt=prompt, max_tokens=24, block_length=8, vicinity=16)
    dual = one(request_of(cache="dual", **decoding))
    assert dual == one(request_of(cache="prefix", **decoding))
    assert dual.stats.reuses == 21


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_lookahead_over_the_whole_canvas_equals_no_bound(cache: str) -> None:
    expected = one(request_of(max_tokens=24, cache=cache))
    assert one(request_of(max_tokens=24, cache=cache, max_lookahead=16)) == expected
    assert one(request_of(max_tokens=24, cache=cache, max_lookahead=500)) == expected


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_no_lookahead_writes_each_block_as_if_it_were_the_last(cache: str) -> None:
    whole = one(request_of(max_tokens=24, cache=cache, max_lookahead=0)).token_ids
    assert one(request_of(max_tokens=8, cache=cache)).token_ids == whole[:8]
    prompt = (1, 2, 3, *whole[:8])
    assert one(request_of(prompt=prompt, max_tokens=8, cache=cache)).token_ids == whole[8:16]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_first_step_of_a_block_is_the_uncached_one(cache: str) -> None:
    with running(DECODER) as engine:
        engine.generate([request_of(max_tokens=8), request_of(max_tokens=8, cache=cache)])
    plain, cached = (watched.steps[0].decision for watched in engine.watched)
    assert plain.positions.tolist() == cached.positions.tolist()
    assert plain.tokens.tolist() == cached.tokens.tolist()


@pytest.mark.parametrize(
    ("cache", "vicinity", "interval", "queries"),
    [
        ("none", 0, None, [27] * 24),
        ("prefix", 0, None, [27] + [24] * 7 + [27] + [16] * 7 + [27] + [8] * 7),
        ("dual", 0, None, ([27] + [8] * 7) * 3),
        ("dual", 0, 4, ([27] + [8] * 3) * 6),
        ("dual", 2, None, [27] + [12] * 7 + [27] + [12] * 7 + [27] + [10] * 7),
        ("prefix", 2, None, [27] + [26] * 7 + [27] + [18] * 7 + [27] + [10] * 7),
    ],
)
def test_tokens_that_a_pass_computes(
    cache: str, vicinity: int, interval: int | None, queries: list[int]
) -> None:
    decoding = dict(cache=cache, vicinity=vicinity, refresh_interval=interval)
    with running(DECODER) as engine:
        (result,) = engine.generate([request_of(max_tokens=24, **decoding)])
    assert [step.decision.span.queries for step in engine.watched[0].steps] == queries
    assert result.stats.refreshes == queries.count(27)
    assert result.stats.reuses == 24 - queries.count(27)


def test_lookahead_bounds_what_a_pass_computes() -> None:
    with running(DECODER) as engine:
        engine.generate([request_of(max_tokens=24, max_lookahead=4)])
    queries = [step.decision.span.queries for step in engine.watched[0].steps]
    assert queries == [15] * 8 + [23] * 8 + [27] * 8


def test_rows_of_one_cache_do_not_read_each_other() -> None:
    """Rows that come and go between others, at places that others used before."""
    requests = [
        request_of(prompt=(i,) * (1 + i % 5), max_tokens=6 + 5 * (i % 3), cache=cache, seed=i)
        for i in range(12)
        for cache in ("dual", "prefix")
    ]
    config = EngineConfig(max_num_seqs=5, kv_cache_tokens=60)
    decoder = tiny_decoder().double()
    with running(decoder, config) as engine:
        first, second = engine.generate(requests), engine.generate(requests[::-1])
        assert "store" in vars(engine._cache)
        wait_until(lambda: engine._cache.used == 0)
    assert first == second[::-1] == [one(request, decoder) for request in requests]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_apd_window_over_all_equals_no_cache(weight: float) -> None:
    decoding = dict(policy="apd", apd_mixture_weight=weight, apd_lookahead=12, max_tokens=24)
    auxiliary = tiny_auxiliary()
    expected = one(request_of(apd_window=None, **decoding), auxiliary=auxiliary)
    assert one(request_of(apd_window=100, **decoding), auxiliary=auxiliary) == expected


def test_apd_window_makes_passes_shorter() -> None:
    decoding = dict(policy="apd", apd_lookahead=8, apd_max_parallel=2, max_tokens=24)
    with running(DECODER, auxiliary=tiny_auxiliary()) as engine:
        engine.generate([request_of(prompt=tuple(range(20)), apd_window=4, **decoding)])
    spans = [step.decision.span for step in engine.watched[0].steps]
    assert spans[0].start == 0
    assert all(span.queries <= 4 + 1 + 8 for span in spans[1:])


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from([policy for policy in POLICIES if policy != "p2"]),
    prompt=st.lists(st.integers(0, 36), min_size=1, max_size=18),
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    cfg_scale=st.sampled_from([0.0, 1.0]),
    steps=st.sampled_from([None, 9]),
    seed=st.integers(0, 1000),
)
def test_exact_cache_of_a_block_causal_model_equals_no_cache(
    policy: Policy, prompt: list[int], max_tokens: int, **decoding: Any
) -> None:
    spec = tiny_spec(BLOCK_CAUSAL)
    assert spec.block_causal
    requests = [
        request_of(
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            policy=policy,
            cache=cache,
            threshold=0.6,
            edit_threshold=0.7,
            **decoding,
        )
        for cache in ("none", "exact")
    ]
    with running(BLOCK_CAUSAL, spec=spec) as engine:
        plain, cached = (engine.generate([request])[0] for request in requests)
        together = engine.generate(requests)
    assert [result.token_ids for result in together] == [plain.token_ids, cached.token_ids]
    assert cached.token_ids == plain.token_ids
    assert cached.stats.nfe == plain.stats.nfe
    assert len(plain.token_ids) == max_tokens
