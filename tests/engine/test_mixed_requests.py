"""Requests of every kind at once, some of them taken back, while passes fail: each is answered as
alone, and nothing stays lent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import pytest

from tests.engine.tiny import EOS, EOT, WatchingEngine, running, tiny_auxiliary, tiny_decoder
from tests.waiting import wait_until
from vdiff_kserve.engine import EngineConfig, GenerationEvent, GenerationRequest
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.models import Decoder
from vdiff_kserve.sampler import Constraints, DecodingParams

REQUESTS = 48
BIDIRECTIONAL = (
    *("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "sequential"),
    *("threshold", "factor", "entropy_bound", "entropy_sum", "local", "credit", "dynamic"),
    *("edit", "p2", "apd"),
)
BLOCK_CAUSAL = ("low_confidence", "sequential", "dynamic", "threshold", "entropy_sum", "edit")


class Dice(random.Random):
    """What requests are made of."""

    def some(self, share: float, **fields: Sequence[Any]) -> dict[str, Any]:
        """Each of the fields, with one of its values, in `share` of the cases."""
        return {name: self.choice(each) for name, each in fields.items() if self.random() < share}

    def tokens(self, count: int, masks: float = 0.0) -> tuple[int, ...]:
        return tuple(-1 if self.random() < masks else self.randrange(30) for _ in range(count))


def decoding_of(dice: Dice, policy: str, *, block_causal: bool) -> DecodingParams:
    fields: dict[str, Any] = {"policy": policy, "seed": dice.randrange(1 << 40)}
    fields["block_length"] = 8 if block_causal else dice.choice((1, 3, 8, 50))
    fields["cache"] = dice.choice(("none", "exact") if block_causal else ("none", "prefix", "dual"))
    fields |= dice.some(0.5, temperature=(0.7, 1.5), steps=(1, 3, 9, 40), threshold=(0.05, 0.3, 1))
    fields |= dice.some(0.3, top_k=(1, 5), top_p=(0.1, 0.9), min_p=(0.1, 1), alg_temp=(0.3,))
    fields |= dice.some(0.3, edit_threshold=(0, 0.1), max_post_edits=(0, 2), entropy_bound=(0, 9))
    fields |= dice.some(0.2, cfg_scale=(0.5,), logits_eos_inf=(True,))
    fields |= dice.some(0.4, top_logprobs=(0, 2))
    if not block_causal:
        fields |= dice.some(0.3, refresh_interval=(1, 3), vicinity=(1, 40))
    if policy == "apd":
        fields |= {"apd_window": dice.choice((0, 4)), "apd_threshold": dice.choice((None, 0.05))}
    asked = dice.some(0.2, presence_penalty=(-1, 1), frequency_penalty=(1,))
    asked |= dice.some(0.2, repetition_penalty=(0.7, 1.5), min_tokens=(1, 4))
    asked |= dice.some(0.2, logit_bias=(((3, 9.0), (EOS, -9.0)),), bad_words=(((5,), (7, 8)),))
    if asked:
        fields["constraints"] = Constraints(end_token_ids=(EOS, EOT), **asked)
    return DecodingParams(**fields)


def request_of(dice: Dice, *, block_causal: bool) -> GenerationRequest:
    policy = dice.choice(BLOCK_CAUSAL if block_causal else BIDIRECTIONAL)
    decoding = decoding_of(dice, policy, block_causal=block_causal)
    length = dice.choice((1, 2, 5, 8, 17, 30))
    known: dict[str, Any] = {}
    if not block_causal and dice.random() < 0.5:
        given = (*dice.tokens(length - 1, masks=0.5), -1)
        known = dice.choice(
            ({"given": given}, {"given": given, "infills": True}, {"draft": dice.tokens(9)})
        )
    if decoding.top_logprobs is not None:
        known["watched"] = dice.random() < 0.5
    prompt = dice.choice((dice.tokens(dice.choice((1, 6, 21))), tuple(range(20))))
    ends = dice.choice(((), (EOS, EOT), (EOS, EOT, 4, 9, 11)))
    return GenerationRequest(
        prompt, length, decoding, ends, priority=dice.choice((0, 0, 1)), **known
    )


def told(events: Sequence[Any]) -> tuple[Any, ...]:
    """What an answer comes to, and its cost."""
    assert all(isinstance(event, GenerationEvent) for event in events), events
    *_, last = events
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    tokens = tuple(token for event in events for token in event.token_ids)
    scored = tuple(each.token_id for event in events for each in event.logprobs)
    stats = last.stats
    cost = (stats.nfe, stats.steps, stats.auxiliary, stats.accepted, stats.completion_tokens)
    return tokens, last.finish_reason, last.end_token_id, scored, cost


def fail_now_and_then(engine: WatchingEngine) -> None:
    """Every fifth pass of several rows raises."""
    step, calls = engine._runner.step, [0]

    def failing(rows: Sequence[Row]) -> list[Decision]:
        calls[0] += len(rows) > 1
        if len(rows) > 1 and calls[0] % 5 == 0:
            raise RuntimeError("this pass fails")
        return step(rows)

    engine._runner.step = failing  # type: ignore[method-assign]


def is_over(events: Sequence[Any]) -> bool:
    return bool(events) and getattr(events[-1], "finish_reason", "an error") is not None


def engine_of(decoder: Decoder, **limits: Any) -> AbstractContextManager[WatchingEngine]:
    auxiliary = None if decoder.config.attention_block else tiny_auxiliary().double()
    return running(decoder, EngineConfig(max_queue=REQUESTS, **limits), auxiliary=auxiliary)


@cache
def asked_alone(block_causal: bool) -> tuple[Decoder, list[GenerationRequest], list[Any]]:
    """A model in double precision, so that what else is in the batch hardly changes a sum;
    requests; and what is told of each of them alone."""
    dice = Dice(f"{block_causal}")
    decoder = tiny_decoder(attention_block=8 if block_causal else None).double()
    requests = [request_of(dice, block_causal=block_causal) for _ in range(REQUESTS)]
    answers = []
    with engine_of(decoder, kv_cache_tokens=300, enable_prefix_caching=False) as engine:
        for request in requests:
            events: list[Any] = []
            engine.post([request], [events.append])
            wait_until(partial(is_over, events))
            answers.append(told(events))
    return decoder, requests, answers


def together(
    decoder: Decoder,
    requests: Sequence[GenerationRequest],
    taken_back: Sequence[int],
    **limits: int,
) -> list[list[Any]]:
    """Each request's events."""
    heard: list[list[Any]] = [[] for _ in requests]
    with engine_of(decoder, max_num_batched_tokens=60, **limits) as engine:
        fail_now_and_then(engine)
        aborts = engine.post(requests, [events.append for events in heard])
        for i in taken_back:
            aborts[i]()
        for i, events in enumerate(heard):
            if i not in taken_back:
                wait_until(partial(is_over, events))
        wait_until(lambda: engine.kv_tokens_used == 0)
    return heard


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 32}, {"max_num_seqs": 5, "kv_cache_tokens": 300}], ids=str
)
def test_each_is_answered_as_alone(block_causal: bool, limits: dict[str, int]) -> None:
    decoder, requests, answers = asked_alone(block_causal)
    taken_back = Dice("taken back").sample(range(REQUESTS), REQUESTS // 6)
    heard = together(decoder, requests, taken_back, **limits)
    for i, answer in enumerate(answers):
        assert i in taken_back or told(heard[i]) == answer, requests[i]
