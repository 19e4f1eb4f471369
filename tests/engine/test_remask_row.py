"""Policy `p2`: every step chooses anew what stays written, as Open-dLLM's loop does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.engine.published_loops import Sampling, p2_generate
from tests.engine.test_infill_row import holes
from tests.engine.test_published_loops import SEED, noise
from tests.engine.tiny import EOS, MASK, logits_of, running, tiny_decoder, tiny_spec
from vdiff_kserve.engine import GenerationEvent, GenerationRequest
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.sampler import DecodingParams

LENGTH = 26
DECODER = tiny_decoder()
PROMPTS = [[5, 9, 12], list(range(20, 33)), [3] * 16]
SAMPLED = {"temperature": 0.7, "top_k": 12, "top_p": 0.9}


def request_of(
    prompt: list[int], end: int = -1, length: int = LENGTH, **fields: Any
) -> GenerationRequest:
    decoding = DecodingParams(**({"policy": "p2", "block_length": 64, "seed": SEED} | fields))
    return GenerationRequest(tuple(prompt), length, decoding, (end,))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("block", "steps"), [(64, 9), (64, 40), (8, 26), (10, 13)])
def test_it_writes_what_the_published_loop_writes(
    block: int, steps: int, sampled: dict[str, Any], shifted: bool
) -> None:
    """All prompts at once here, one by one there; an end token, too."""
    sampling = Sampling(MASK, **sampled, noise=noise)
    forward = partial(logits_of, DECODER, shifted=shifted)

    def loop(prompt: list[int], end: int) -> tuple[list[int], int]:
        return p2_generate(forward, prompt, LENGTH, block, steps, sampling, end)

    end = loop(PROMPTS[0], -1)[0][LENGTH // 2]
    expected = [loop(prompt, end) for prompt in PROMPTS]
    assert sum(taken_back for _, taken_back in expected) > 5
    requests = [request_of(p, end, block_length=block, steps=steps, **sampled) for p in PROMPTS]
    with running(DECODER, shifted=shifted) as engine:
        results = engine.generate(requests)
    assert [list(result.token_ids) for result in results] == [ids for ids, _ in expected]
    assert all(result.stats.nfe <= steps for result in results)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_nothing_is_sent_before_its_block_is_whole(cache: str) -> None:
    with running(DECODER) as engine:
        engine.generate([request_of(PROMPTS[0], length=24, block_length=8, cache=cache)])
        (watched,) = engine.watched
    sent = [step for step in watched.steps if step.block != watched.steps[-1].block]
    assert len({step.block for step in watched.steps}) == 3
    for step in sent:
        left = step.masked_after[: step.block[0]]
        assert not left.any()
        assert torch.equal(step.before[: step.block[0]], step.after[: step.block[0]])
    taken = [(~s.masked_before & s.masked_after).nonzero().squeeze(-1) for s in watched.steps]
    assert sum(len(each) for each in taken) > 3
    assert all(
        (step.after[at] == MASK).all() for step, at in zip(watched.steps, taken, strict=True)
    )


def test_a_watcher_is_told_what_was_taken_back() -> None:
    request = GenerationRequest(
        tuple(PROMPTS[1]),
        16,
        DecodingParams(policy="p2", block_length=16, top_logprobs=2),
        (EOS,),
        watched=True,
    )
    events: list[GenerationEvent] = []
    with running(DECODER) as engine:
        engine._queue([request], [events.append])  # type: ignore[list-item]
        engine.generate([request])
    written: set[int] = set()
    for view in [event.view for event in events if event.view is not None]:
        assert written >= set(view.masked_again)
        written = (written - set(view.masked_again)) | set(view.positions)
        assert len(written) == 16 - view.masks
    told = [each for event in events for each in event.logprobs]
    tokens = [token for event in events for token in event.token_ids]
    assert [each.token_id for each in told][: len(tokens)] == tokens


def test_given_tokens_are_never_taken_back() -> None:
    given = holes(5, (7, 8), 6, (9, 10))
    decoding = DecodingParams(policy="p2", block_length=64, steps=5)
    request = GenerationRequest((1, 2, 3), len(given), decoding, (), given=given, infills=True)
    with running(DECODER, shifted=True) as engine:
        engine.generate([request])
        (watched,) = engine.watched
    fixed = watched.row.fixed
    assert fixed.sum() == 7
    for step in watched.steps:
        assert not step.masked_after[fixed].any()
        assert torch.equal(step.after[fixed], watched.steps[0].before[fixed])
    assert not watched.row.masked.any()


def test_models_that_see_blocks_only_are_refused() -> None:
    decoder = tiny_decoder(attention_block=8)
    with pytest.raises(ValueError, match="see the whole canvas"):
        make_row(request_of(PROMPTS[0]), lambda _: None, tiny_spec(decoder), has_auxiliary=False)
