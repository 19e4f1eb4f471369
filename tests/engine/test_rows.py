"""What a request's row promises at every step, for every policy and cache."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny import (
    EOS,
    MASK,
    VOCAB,
    Watched,
    generate,
    request_of,
    running,
    tiny_auxiliary,
    tiny_decoder,
)
from vdiff_kserve.engine import (
    EngineConfig,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
)
from vdiff_kserve.models import Decoder
from vdiff_kserve.sampler import SCHEDULED_POLICIES, DecodingParams, Policy

POLICIES: tuple[Policy, ...] = get_args(Policy)
DECODER = tiny_decoder()
AUXILIARY = tiny_auxiliary()

unit = st.floats(0.0, 1.0)
tokens = st.integers(0, VOCAB - 1)


@st.composite
def decodings(draw: st.DrawFn, policy: Policy) -> DecodingParams:
    return DecodingParams(
        policy=policy,
        steps=draw(st.none() | st.integers(1, 30)),
        block_length=draw(st.integers(1, 12)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.0])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, 0, 1, 5])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        alg_temp=draw(st.sampled_from([0.0, 0.5])),
        threshold=draw(unit),
        factor=draw(st.floats(0.01, 4.0)),
        entropy_bound=draw(st.floats(0.0, 3.0)),
        neighbour_threshold=draw(unit),
        radius=draw(st.integers(0, 6)),
        edit_threshold=draw(unit),
        max_post_edits=draw(st.integers(0, 4)),
        apd_mixture_weight=draw(unit),
        apd_window=draw(st.none() | st.integers(0, 8)),
        apd_lookahead=draw(st.none() | st.integers(1, 30)),
        apd_max_parallel=draw(st.integers(1, 9)),
        apd_threshold=draw(st.none() | unit),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
        logits_eos_inf=draw(st.booleans()),
        confidence_eos_eot_inf=draw(st.booleans()),
        seed=draw(st.integers(0, 2**62)),
        cache=draw(st.sampled_from(["none", "prefix", "dual"])),
        refresh_interval=draw(st.none() | st.integers(1, 4)),
        vicinity=draw(st.integers(0, 5)),
        max_lookahead=draw(st.none() | st.integers(0, 20)),
    )


@st.composite
def requests(draw: st.DrawFn, policy: Policy) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=tuple(draw(st.lists(tokens, min_size=1, max_size=6))),
        max_tokens=draw(st.integers(1, 24)),
        decoding=draw(decodings(policy)),
        end_token_ids=draw(st.sampled_from([(), (EOS,), (3, 5, 7)])),
    )


def check_steps(watched: Watched, policy: Policy) -> None:
    """What holds for every step of every policy."""
    row = watched.row
    for step in watched.steps:
        positions = step.decision.positions
        changed = (step.before != step.after).nonzero().squeeze(-1).tolist()
        assert set(changed) <= set(positions.tolist()), "written outside the decision"
        span = step.decision.span
        assert span.start <= span.output_start, "wants the state of a token that is not computed"
        assert span.output_start + span.outputs <= span.start + span.queries <= span.keys
        assert all(step.block[0] <= p < step.block[1] for p in positions.tolist()), "outside block"
        was_open = step.masked_before[positions]
        if policy == "p2":
            taken_back = step.masked_after[positions]
            assert torch.equal(was_open, ~taken_back), "a position that did not change"
            assert (step.after[positions][taken_back] == MASK).all()
            assert MASK not in step.after[positions][~taken_back].tolist(), "a mask was written"
            continue
        assert MASK not in step.after[positions].tolist(), "a mask was written"
        assert not (step.masked_after & ~step.masked_before).any(), "un-committed"
        if policy != "edit":
            assert was_open.all(), "a written position was written again"
            assert len(positions) > 0, "a step committed nothing"
        elif step.masked_before[slice(*step.block)].any():
            assert was_open.any(), "an editing step left every mask in place"
    assert (row.canvas[: row.prompt_length] == watched.steps[0].before[: row.prompt_length]).all()


def check_result(watched: Watched, result: GenerationResult) -> None:
    row, request = watched.row, watched.row.request
    answer = row.canvas[row.prompt_length : row.frontier].tolist()
    ends = [i for i, token in enumerate(answer) if token in request.end_token_ids]
    if result.finish_reason == "stop":
        assert ends == [len(answer) - 1]
        answer = answer[:-1]
    else:
        assert not ends
        assert len(answer) == request.max_tokens
        assert not row.masked.any()
    assert list(result.token_ids) == answer
    assert result.stats.completion_tokens == row.frontier - row.prompt_length
    assert result.stats.nfe == len(watched.steps) >= result.stats.steps
    if request.decoding.logits_eos_inf:
        assert EOS not in result.token_ids


@pytest.mark.parametrize(
    ("policy", "auxiliary"), [*((policy, None) for policy in POLICIES), ("apd", AUXILIARY)]
)
def test_steps_keep_their_promises(policy: Policy, auxiliary: Decoder | None) -> None:
    @settings(max_examples=40, deadline=None)
    @given(request=requests(policy), shifted=st.booleans())
    def check(request: GenerationRequest, shifted: bool) -> None:
        with running(DECODER, auxiliary=auxiliary, shifted=shifted) as engine:
            (result,) = engine.generate([request])
        (watched,) = engine.watched
        check_steps(watched, policy)
        check_result(watched, result)

    check()


@pytest.mark.parametrize("policy", sorted(SCHEDULED_POLICIES))
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_every_block_begins_with_a_refresh(policy: Policy, cache: str) -> None:
    """Also where the schedule's first steps commit nothing and are passed over (Dream's do)."""
    for steps in (None, 16, 40):
        with running(DECODER) as engine:
            engine.generate([request_of(policy=policy, cache=cache, steps=steps)])
        block = None
        for step in engine.watched[0].steps:
            whole = step.decision.span.queries == step.decision.span.keys == len(step.after)
            assert whole == (step.block != block)
            block = step.block


def test_refresh_interval_counts_passes_also_when_steps_are_passed_over() -> None:
    request = request_of(policy="entropy", steps=40, cache="dual", refresh_interval=3)
    with running(DECODER) as engine:
        engine.generate([request])
    for block in {step.block for step in engine.watched[0].steps}:
        steps = [step for step in engine.watched[0].steps if step.block == block]
        whole = [step.decision.span.queries == step.decision.span.keys for step in steps]
        assert whole == [i % 3 == 0 for i in range(len(steps))]


@pytest.mark.parametrize(("max_tokens", "block_length"), [(13, 8), (1, 8), (7, 3), (9, 9), (5, 32)])
def test_max_tokens_need_not_be_a_multiple_of_the_block(max_tokens: int, block_length: int) -> None:
    request = request_of(max_tokens=max_tokens, block_length=block_length)
    with running(DECODER) as engine:
        (result,) = engine.generate([request])
    assert len(result.token_ids) == max_tokens == result.stats.nfe
    ends = sorted({step.block[1] for step in engine.watched[0].steps})
    assert ends[-1] == 3 + max_tokens
    assert len(ends) == -(-max_tokens // block_length)


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_steps_are_for_the_whole_answer(steps: int) -> None:
    request = request_of(max_tokens=16, steps=steps, block_length=16)
    (result,) = generate(DECODER, request)
    assert result.stats.nfe == steps


def free_text(**decoding: Any) -> tuple[int, ...]:
    return generate(DECODER, request_of(max_tokens=24, **decoding))[0].token_ids


def test_no_forward_pass_after_the_end_token() -> None:
    text = free_text()
    end = text[9]
    first = text.index(end)
    request = replace(request_of(max_tokens=24), end_token_ids=(end,))
    with running(DECODER) as engine:
        (result,) = engine.generate([request])
    assert result.finish_reason == "stop"
    assert result.token_ids == text[:first]
    assert result.stats.completion_tokens == first + 1
    steps = engine.watched[0].steps
    assert result.stats.nfe == len(steps) < 24
    end_position = 3 + first
    assert not steps[-1].masked_after[:end_position].any()
    assert steps[-2].masked_before[: end_position + 1].any()


def test_end_token_waits_for_what_stands_before_it() -> None:
    """An end token committed with masks to its left ends the answer when these are filled."""
    request = request_of(max_tokens=8)
    with running(DECODER) as engine:
        engine.generate([request])
    first_written = int(engine.watched[0].steps[0].decision.positions[0])
    assert first_written > 3, "the model should write a later position first"
    end = int(engine.watched[0].row.canvas[first_written])
    with running(DECODER) as engine:
        (result,) = engine.generate([replace(request, end_token_ids=(end,))])
    assert result.finish_reason == "stop"
    assert not engine.watched[0].steps[-1].masked_after[:first_written].any()
    assert result.stats.nfe > 1


def test_finish_reason_is_stop_also_when_the_canvas_is_full() -> None:
    text = free_text()
    end = text[-1]
    assert end not in text[:-1], "the test needs a last token that stands nowhere else"
    request = replace(request_of(max_tokens=24), end_token_ids=(end,))
    (result,) = generate(DECODER, request)
    assert result.finish_reason == "stop"
    assert result.token_ids == text[:-1]
    assert result.stats.completion_tokens == 24


def test_without_end_tokens_the_canvas_is_filled() -> None:
    (result,) = generate(DECODER, request_of(max_tokens=24))
    assert (result.finish_reason, len(result.token_ids)) == ("length", 24)


def test_a_prompt_may_hold_the_mask_token() -> None:
    request = request_of(prompt=(1, MASK, 2), max_tokens=10)
    with running(DECODER) as engine:
        (result,) = engine.generate([request])
    assert engine.watched[0].row.canvas[:3].tolist() == [1, MASK, 2]
    assert len(result.token_ids) == 10


def test_events_are_the_committed_prefix() -> None:
    """Text leaves from left to right, once it cannot change, and the last event says why."""
    request = request_of(max_tokens=24, block_length=8)
    with running(DECODER) as engine:
        events: list[GenerationEvent] = []
        done = engine.generate
        row = engine.make_row(request, events.append)
        while row.finish_reason is None:
            (decision,) = engine._runner.step([row])
            row.apply(decision)
            sent = [token for event in events for token in event.token_ids]
            assert sent == row.canvas[3 : 3 + len(sent)].tolist()
            assert not row.masked[: 3 + len(sent)].any()
        (whole,) = done([request])
    assert tuple(sent) == whole.token_ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert all(event.token_ids for event in events)
    assert events[-1].stats == whole.stats


def test_edited_text_is_sent_only_when_it_is_final() -> None:
    decoding = dict(policy="edit", threshold=0.3, edit_threshold=0.5, max_post_edits=5)
    with running(DECODER) as engine:
        events: list[GenerationEvent] = []
        row = engine.make_row(request_of(max_tokens=24, **decoding), events.append)
        while row.finish_reason is None:
            before = row.block_start
            (decision,) = engine._runner.step([row])
            row.apply(decision)
            sent = [token for event in events for token in event.token_ids]
            done = row.finish_reason is not None
            assert len(sent) == (len(row) if done else row.block_start) - 3
            assert sent == row.canvas[3 : 3 + len(sent)].tolist()
            assert row.block_start >= before
    assert len(sent) == 24


def test_editing_replaces_written_tokens() -> None:
    decoding = dict(policy="edit", threshold=0.2, edit_threshold=0.3)
    with running(DECODER) as engine:
        engine.generate([request_of(max_tokens=24, **decoding)])
    steps = engine.watched[0].steps
    edits = [
        (old, new)
        for step in steps
        for old, new, was_masked in zip(
            step.before.tolist(), step.after.tolist(), step.masked_before.tolist(), strict=True
        )
        if not was_masked and old != new
    ]
    assert edits
    limit = DecodingParams().max_post_edits
    for block in {step.block for step in steps}:
        own = [step for step in steps if step.block == block]
        assert sum(not s.masked_before[slice(*block)].any() for s in own) <= limit


def test_max_num_seqs_of_one_runs_requests_one_after_the_other() -> None:
    wanted = [request_of(seed=i, temperature=1.0) for i in range(3)]
    with running(DECODER, EngineConfig(max_num_seqs=1)) as engine:
        together = engine.generate(wanted)
    assert together == generate(DECODER, *wanted)
