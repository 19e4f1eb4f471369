"""Holes in a given text: what is given stays and is seen, and every hole ends by itself."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any, get_args

import pytest
import torch

from tests.engine.tiny import (
    EOS,
    MASK,
    WatchingEngine,
    logits_of,
    running,
    tiny_decoder,
    tiny_spec,
)
from vdiff_kserve.engine import EngineError, GenerationEvent, GenerationRequest
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.models import Decoder
from vdiff_kserve.sampler import DecodingParams, Policy

DECODER = tiny_decoder()
PROMPT, SUFFIX = (1, 2, 3), (7, 8, 9, 10, 11, 12)


def holes(*parts: int | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers are holes of so many tokens, tuples are given."""
    return tuple(t for part in parts for t in ((-1,) * part if isinstance(part, int) else part))


def request_of(
    given: tuple[int, ...], ends: tuple[int, ...] = (), **fields: Any
) -> GenerationRequest:
    judged = fields.pop("judged", False)
    decoding = DecodingParams(**({"block_length": 4} | fields))
    return GenerationRequest(
        PROMPT, len(given), decoding, ends, given=given, infills=True, judged=judged
    )


def events_of(engine: WatchingEngine, *requests: GenerationRequest) -> list[list[GenerationEvent]]:
    """All events of each request, all submitted at once."""
    inboxes: list[SimpleQueue[GenerationEvent | EngineError]] = [SimpleQueue() for _ in requests]
    engine._queue(requests, [inbox.put for inbox in inboxes])
    told: list[list[GenerationEvent]] = []
    for inbox in inboxes:
        told.append([])
        while not told[-1] or told[-1][-1].finish_reason is None:
            event = inbox.get(timeout=60)
            assert isinstance(event, GenerationEvent), event
            told[-1].append(event)
    return told


def filled_one_by_one(decoder: Decoder, given: tuple[int, ...], *, shifted: bool) -> torch.Tensor:
    """The reference: the surest mask of the first four is written, until none is left."""
    canvas = torch.tensor(PROMPT + tuple(MASK if t < 0 else t for t in given))
    masked = torch.tensor([False] * len(PROMPT) + [t < 0 for t in given])
    while masked.any():
        block = masked.nonzero().squeeze(-1)[:4]
        while masked[block].any():
            scores = logits_of(decoder, canvas, shifted=shifted)
            left = block[masked[block]]
            candidates = scores.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1)
            sure = scores.softmax(-1)[left, candidates[left]]
            at = left[sure.argmax()]
            canvas[at], masked[at] = candidates[at], False
    return canvas


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("given", [holes(6, SUFFIX), holes(2, (5, 6), 3, (7,), 4, SUFFIX)])
def test_holes_are_filled_as_a_plain_loop_over_the_whole_canvas_fills_them(
    given: tuple[int, ...], shifted: bool
) -> None:
    with running(DECODER, shifted=shifted) as engine:
        events_of(engine, request_of(given))
        (watched,) = engine.watched
    assert torch.equal(watched.row.canvas, filled_one_by_one(DECODER, given, shifted=shifted))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("policy", get_args(Policy))
def test_what_is_given_never_changes_and_every_hole_is_told_in_order(
    policy: Policy, cache: str
) -> None:
    given = holes(5, (5, 6), 7, SUFFIX)
    request = request_of(given, (EOS, 3, 4), policy=policy, cache=cache, threshold=0.3)
    with running(DECODER) as engine:
        (told,) = events_of(engine, request)
        (watched,) = engine.watched
    fixed = torch.tensor([True] * len(PROMPT) + [t >= 0 for t in given])
    for step in watched.steps:
        assert torch.equal(step.after[fixed], step.before[fixed])
    assert [e.hole for e in told] == sorted(e.hole for e in told)
    for hole, size in enumerate((5, 7)):
        own = [e for e in told if e.hole == hole]
        tokens = sum(len(e.token_ids) for e in own)
        ended = any(e.end_token_id is not None for e in own)
        assert tokens < size if ended else tokens == size
    assert told[-1].stats.completion_tokens == sum(
        len(e.token_ids) + (e.end_token_id is not None) for e in told
    )


def test_an_end_token_gives_up_the_rest_of_its_hole_without_a_pass() -> None:
    given = holes(8, SUFFIX)
    with running(DECODER) as engine:
        (whole,) = events_of(engine, request_of(given))
        tokens = [t for e in whole for t in e.token_ids]
        end = tokens[2]
        (cut,) = events_of(engine, request_of(given, (end,)))
    text = [t for e in cut for t in e.token_ids]
    first = tokens.index(end)
    assert text == tokens[:first]
    assert cut[-1].finish_reason == "stop"
    assert cut[-1].end_token_id == end
    assert cut[-1].stats.nfe <= whole[-1].stats.nfe
    rest = engine.watched[1].row.canvas[len(PROMPT) + first + 1 : len(PROMPT) + 8]
    assert set(rest.tolist()) <= {EOS, *tokens}


def test_a_hole_is_filled_with_regard_to_what_follows() -> None:
    with running(DECODER) as engine:
        texts = {
            tuple(t for e in told for t in e.token_ids)
            for told in events_of(
                engine, *(request_of(holes(4, (t, t, t, t))) for t in range(5, 15))
            )
        }
    assert len(texts) > 1


@pytest.mark.parametrize("shifted", [False, True])
def test_a_judgement_is_the_mean_over_the_hole_and_what_follows_given_the_text_before(
    shifted: bool,
) -> None:
    given = holes(3, SUFFIX)
    request = request_of(given, top_logprobs=0, judged=True)
    with running(DECODER, shifted=shifted) as engine:
        (told,) = events_of(engine, request)
    text = [t for e in told for t in e.token_ids]
    scores = [each.logprob for e in told for each in e.logprobs]
    assert len(scores) == 3
    line = torch.tensor([*PROMPT, *text, *SUFFIX[:4]])
    for place in range(len(PROMPT) + 3, len(line)):
        canvas = line.clone()
        canvas[place:] = MASK
        told_of = logits_of(DECODER, canvas, shifted=shifted).log_softmax(-1)
        scores.append(float(told_of[place, line[place]]))
    assert told[-1].score == pytest.approx(sum(scores) / 7, abs=1e-4)
    assert told[-1].stats.nfe == 3 + 4


def test_rows_do_not_depend_on_their_neighbours() -> None:
    requests = [
        request_of(holes(n, SUFFIX), top_logprobs=0, judged=True, cache=cache)
        for n, cache in ((2, "none"), (5, "prefix"), (9, "dual"), (3, "none"))
    ]
    with running(DECODER) as engine:
        together = events_of(engine, *requests)
        alone = [events_of(engine, request)[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert [e.token_ids for e in one] == [e.token_ids for e in other]
        assert one[-1].score == pytest.approx(other[-1].score, abs=1e-4)


def test_what_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="leave a mask"):
        GenerationRequest(PROMPT, 2, DecodingParams(), given=(5, 6))
    causal = tiny_decoder(attention_block=4)
    with pytest.raises(ValueError, match="block-causal"):
        make_row(request_of(holes(2, (5,))), lambda _: None, tiny_spec(causal), False)
