"""In float32 on the embedded model, an answer does not depend on what else runs."""

from __future__ import annotations

import random

import torch

from hack.embedded.corpus import held_out_suite
from tests.device import TEST_DEVICE
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult
from vdiff_kserve.models import load_decoder, load_tokenizer, with_end_of_turn
from vdiff_kserve.sampler import DecodingParams

POLICIES = ("low_confidence", "threshold", "factor", "entropy_bound", "local", "topk_margin")


def mixed_requests(count: int) -> list[GenerationRequest]:
    tokenizer = load_tokenizer(EMBEDDED)
    choose = random.Random(1)
    return [
        GenerationRequest(
            prompt_ids=tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": example.prompt}], return_dict=False
                )
            ),
            max_tokens=choose.randint(8, 72),
            decoding=DecodingParams(
                policy=POLICIES[i % len(POLICIES)],
                cache=("none", "prefix", "dual")[i % 3],
                temperature=(0.0, 0.7)[i % 2],
                seed=i,
                block_length=choose.choice((8, 16, 32)),
            ),
        )
        for i, example in enumerate(held_out_suite(count))
    ]


def test_answers_are_the_same_alone_in_a_batch_and_staggered() -> None:
    decoder, spec = load_decoder(EMBEDDED, TEST_DEVICE, torch.float32)
    spec = with_end_of_turn(spec, load_tokenizer(EMBEDDED))
    requests = mixed_requests(64)

    def answers(order: list[int], slots: int, at_once: int) -> dict[int, GenerationResult]:
        engine = Engine(decoder, spec, EngineConfig(max_num_seqs=slots, max_queue=64))
        engine.start()
        results: dict[int, GenerationResult] = {}
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            results |= zip(chosen, engine.generate([requests[i] for i in chosen]), strict=True)
        engine.stop()
        return results

    in_order = list(range(len(requests)))
    shuffled = random.Random(2).sample(in_order, len(in_order))
    alone = answers(in_order, slots=1, at_once=1)
    assert answers(in_order, slots=64, at_once=64) == alone
    assert answers(in_order[::-1], slots=7, at_once=64) == alone
    assert answers(shuffled, slots=16, at_once=20) == alone
