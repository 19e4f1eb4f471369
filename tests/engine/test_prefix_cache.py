"""Prompts that begin alike: what is reused, that it is exact, and that nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.tiny import (
    CONFIG,
    WatchingEngine,
    request_of,
    running,
    tiny_decoder,
    tiny_spec,
)
from tests.waiting import wait_until
from vdiff_kserve.engine import EngineConfig, GenerationRequest
from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.prefix_cache import PrefixCache, block_hashes
from vdiff_kserve.models import Decoder, ForwardBatch, ModelSpec

BLOCK = 8
BLOCK_CAUSAL = tiny_decoder(attention_block=BLOCK).double()
SPEC: ModelSpec = tiny_spec(BLOCK_CAUSAL)


class CountingDecoder(Decoder):
    """A decoder that counts the tokens of its passes."""

    tokens = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.tokens += len(batch.input_ids)
        return super().forward(batch)


def counting(decoder: Decoder) -> CountingDecoder:
    counted = CountingDecoder(decoder.config).double()
    counted.load_state_dict(decoder.state_dict())
    return counted.requires_grad_(False).eval()


def exact(prompt: tuple[int, ...], max_tokens: int = 12, **decoding: Any) -> GenerationRequest:
    return request_of(prompt=prompt, max_tokens=max_tokens, cache="exact", **decoding)


def chat(engine: WatchingEngine, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    """The answers to requests sent one after the other."""
    return [engine.generate([request])[0].token_ids for request in requests]


def test_second_turn_reuses_the_first_turns_prompt_and_answer() -> None:
    first = exact(tuple(range(20)), max_tokens=20)
    with running(BLOCK_CAUSAL, spec=SPEC) as engine:
        (answer,) = chat(engine, first)
        second = exact((*first.prompt_ids, *answer, 5, 6), max_tokens=8)
        (result,) = engine.generate([second])
    assert result.stats.cached_tokens == 32, "all blocks but the one that the first turn ended in"
    with running(BLOCK_CAUSAL, EngineConfig(enable_prefix_caching=False), spec=SPEC) as engine:
        (plain,) = engine.generate([second])
    assert plain.stats.cached_tokens == 0
    assert result.token_ids == plain.token_ids


def test_prompt_that_was_seen_costs_no_pass_over_it() -> None:
    counted = counting(BLOCK_CAUSAL)
    with running(counted, spec=SPEC) as engine:
        request = exact(tuple(range(24)), max_tokens=8)
        once = chat(engine, request)
        tokens, counted.tokens = counted.tokens, 0
        assert chat(engine, request) == once
    assert (tokens - counted.tokens) == 24


def test_block_with_the_first_token_to_write_is_never_reused() -> None:
    with running(BLOCK_CAUSAL, spec=SPEC) as engine:
        request = exact(tuple(range(16)), max_tokens=8)
        chat(engine, request)
        (again,) = engine.generate([request])
        assert again.stats.cached_tokens == 16
        (shorter,) = engine.generate([exact(tuple(range(15)), max_tokens=8)])
        assert shorter.stats.cached_tokens == 8


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 20)),
        min_size=2,
        max_size=8,
    ),
    capacity=st.integers(48, 160),
    cfg_scale=st.sampled_from([0.0, 1.0]),
)
def test_answers_are_those_of_an_engine_without_memory_of_others(
    turns: list[tuple[int, int, int]], capacity: int, cfg_scale: float
) -> None:
    """Prompts that share beginnings of any length, in a cache too small to keep them all."""
    requests = [
        exact((7,) * shared + (1, 2, 3)[:kind] + (4,), length, cfg_scale=cfg_scale, seed=kind)
        for kind, shared, length in turns
    ]
    requests = [r for r in requests if (1 + (cfg_scale > 0)) * (len(r.prompt_ids) + 30) < capacity]
    plain = EngineConfig(enable_prefix_caching=False)
    with running(BLOCK_CAUSAL, plain, spec=SPEC) as engine:
        expected = chat(engine, *requests)
    config = EngineConfig(max_num_seqs=3, kv_cache_tokens=capacity)
    with running(BLOCK_CAUSAL, config, spec=SPEC) as engine:
        assert chat(engine, *requests) == expected
        assert [r.token_ids for r in engine.generate(requests)] == expected
        wait_until(lambda: engine.num_running == 0)
        assert engine.kv_tokens_used == 0
        engine._prefixes.clear()
        assert engine._cache.used == 0
        assert engine._cache.reserve(capacity) == 0, "the cache is not in one piece"


def test_least_recently_used_prompt_makes_room() -> None:
    cache = KVCache(CONFIG, 48, torch.device("cpu"), torch.float32)
    prefixes = PrefixCache(cache, BLOCK)
    prompts = [(kind,) * 16 for kind in range(4)]
    for prompt in prompts[:3]:
        offset = prefixes.reserve(16)
        prefixes.publish(offset, prompt)
        prefixes.release(offset)
    offset = prefixes.reserve(16)  # the first is gone
    assert prefixes.begin(offset, prompts[0]) == 0
    prefixes.release(offset)
    assert prefixes.idle_tokens == 32
    one = prefixes.reserve(16)
    assert prefixes.begin(one, prompts[1]) == 16  # used now, so the third goes next
    two = prefixes.reserve(16)
    assert prefixes.begin(two, prompts[2]) == 0
    assert prefixes.begin(two, prompts[1]) == 16
    for offset in (one, two):
        prefixes.release(offset)
    prefixes.clear()
    assert cache.used == 0


def test_copy_of_a_prompt_that_is_kept_twice_is_given_back() -> None:
    cache = KVCache(CONFIG, 64, torch.device("cpu"), torch.float32)
    prefixes = PrefixCache(cache, BLOCK)
    runs = [prefixes.reserve(16) for _ in range(2)]
    for run in runs:
        prefixes.publish(run, (1,) * 16)
        prefixes.release(run)
    assert prefixes.idle_tokens == cache.used == 16


def test_run_whose_later_copy_made_room_is_given_back() -> None:
    """Two rows begin alike; the second ends and makes room for others before the first is taken
    out."""
    cache = KVCache(CONFIG, 48, torch.device("cpu"), torch.float32)
    prefixes = PrefixCache(cache, BLOCK)
    first, second = (prefixes.reserve(16) for _ in range(2))
    for run in (first, second):
        prefixes.publish(run, (1,) * 16)
    prefixes.release(second)
    other = prefixes.reserve(32)  # in the place of the second
    prefixes.release(first)
    prefixes.release(other)
    assert prefixes.idle_tokens == cache.used == 0


def test_hash_of_a_block_depends_on_all_before_it() -> None:
    first = block_hashes((1,) * 8 + (2,) * 8, BLOCK)
    second = block_hashes((3,) * 8 + (2,) * 8, BLOCK)
    assert len(first) == 2
    assert not set(first) & set(second)
    assert block_hashes((1,) * 15, BLOCK) == first[:1]


def test_bidirectional_models_keep_nothing() -> None:
    decoder = tiny_decoder().double()
    with running(decoder) as engine:
        request = request_of(prompt=tuple(range(16)), cache="dual")
        engine.generate([request])
        (again,) = engine.generate([request])
    assert again.stats.cached_tokens == 0
    assert engine._prefixes is None


def test_choices_of_one_request_share_their_first_pass() -> None:
    """The answers are those of requests sent alone, for one prompt pass instead of four."""
    for decoder, spec, cache in (
        (tiny_decoder().double(), None, "dual"),
        (tiny_decoder().double(), None, "none"),
        (BLOCK_CAUSAL, SPEC, "exact"),
    ):
        counted = counting(decoder)
        request = request_of(prompt=(4,) * 17, max_tokens=8, cache=cache, temperature=3.0)
        choices = [
            replace(request, decoding=replace(request.decoding, seed=seed)) for seed in range(4)
        ]
        spec = spec or tiny_spec(decoder)
        with running(counted, EngineConfig(enable_prefix_caching=False), spec=spec) as engine:
            alone = chat(engine, *choices)
            alone_tokens, counted.tokens = counted.tokens, 0
            together = [result.token_ids for result in engine.generate(choices)]
        assert together == alone
        assert len(set(alone)) > 1
        saved = alone_tokens - counted.tokens
        assert saved == 3 * (24 if cache == "exact" else 25), cache
