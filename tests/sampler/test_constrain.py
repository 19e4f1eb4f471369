"""What constraints do to logits, against plain loops, and which commits must wait."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.sampler.rows import VOCAB, OpenRow, row_of, step_rows
from vdiff_kserve.sampler import (
    ConstrainedRow,
    Constraints,
    ConstraintTable,
    DecodingParams,
    Policy,
    StepRows,
    TokenRules,
    constrain,
    hold_back,
)

FIRST = 3
PROMPT = (4, 4, 8)


def with_constraints(rows: list[OpenRow], answers: list[list[int]]) -> StepRows:
    """The batch, each row with its answer (-1 for a mask) behind a prompt of `FIRST` tokens."""
    batch = step_rows(rows)
    asking = [
        ConstrainedRow(
            i,
            row.params.constraints,
            TokenRules.of(row.params.constraints, PROMPT, VOCAB, TEST_DEVICE),
            FIRST,
            torch.tensor(answer),
            torch.tensor(row.positions),
        )
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        if row.params.constraints is not None
    ]
    return replace(batch, constraints=ConstraintTable.of(asking, len(rows), TEST_DEVICE))


def open_row(
    answer: list[int],
    logits: Tensor,
    constraints: Constraints | None,
    policy: Policy = "threshold",
) -> OpenRow:
    """A row whose masks are open, or all positions when it edits; `logits` are of the answer."""
    edits = policy == "edit"
    places = [i for i, token in enumerate(answer) if token < 0 or edits]
    return OpenRow(
        DecodingParams(policy, constraints=constraints),
        tuple(FIRST + i for i in places),
        tuple(answer[i] for i in places),
        logits[places],
    )


def constrained(logits: Tensor, rows: StepRows) -> Tensor:
    """Logits as the rows' constraints leave them, on the host."""
    return constrain(logits.to(TEST_DEVICE, copy=True), rows).cpu()


def by_loop(logits: list[float], place: int, answer: list[int], asked: Constraints) -> list[float]:
    """The logits of one answer position, rule after rule."""
    logits = list(logits)
    allowed = asked.allowed_token_ids
    for token in range(VOCAB):
        if allowed is not None and token not in allowed:
            logits[token] = -math.inf
        if token in asked.end_token_ids and place < asked.min_tokens:
            logits[token] = -math.inf
        text = [*answer[:place], token, *answer[place + 1 :]]
        for word in asked.bad_words:
            for start in range(len(text) - len(word) + 1):
                inside = start <= place < start + len(word)
                if inside and tuple(text[start : start + len(word)]) == word:
                    logits[token] = -math.inf
    for token, bias in asked.logit_bias:
        logits[token] += bias
    ends = [i for i, token in enumerate(answer) if token in asked.end_token_ids]
    written = answer[: ends[0]] if ends else answer
    counts = Counter(t for i, t in enumerate(written) if t >= 0 and i != place)
    for token in range(VOCAB):
        if counts[token] or token in PROMPT:
            by = asked.repetition_penalty
            logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
        logits[token] -= asked.frequency_penalty * counts[token]
        logits[token] -= asked.presence_penalty * (counts[token] > 0)
    return logits


tokens = st.integers(0, VOCAB - 2)
penalty = st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0])


@st.composite
def constraints_of(draw: st.DrawFn) -> Constraints:
    return Constraints(
        logit_bias=tuple(draw(st.dictionaries(tokens, st.floats(-100, 100), max_size=3)).items()),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=1).map(tuple)),
        bad_words=tuple(
            draw(
                st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=3)
            )
        ),
        min_tokens=draw(st.integers(0, 6)),
        end_token_ids=draw(st.sampled_from([(), (9, 10), (2,)])),
        presence_penalty=draw(penalty),
        frequency_penalty=draw(penalty),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.7])),
    )


@st.composite
def rows_and_answers(draw: st.DrawFn) -> list[tuple[OpenRow, list[int], Tensor]]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        answer = draw(
            st.lists(st.sampled_from([-1, -1, -1, 0, 1, 2, 3, 9]), min_size=1, max_size=9)
        )
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        logits = torch.randn(len(answer), VOCAB, generator=generator) * 3
        asked = draw(st.none() | constraints_of())
        if asked is not None:  # a bad word never stands in an answer
            words = asked.bad_words
            assume(not any(complete(answer, words, place) for place in range(len(answer))))
        row = open_row(answer, logits, asked, draw(st.sampled_from(["threshold", "edit"])))
        if row.positions:
            found.append((row, answer, logits))
    return found


@settings(max_examples=60, deadline=None)
@given(batch=rows_and_answers(), cut=st.integers(0, 30))
def test_logits_are_those_of_a_plain_loop(batch, cut: int) -> None:
    """For every row whatever its neighbours ask, and however the positions are cut in chunks."""
    if not batch:
        return
    rows, answers, all_logits = (list(each) for each in zip(*batch, strict=True))
    given_logits = torch.cat([row.logits for row in rows])
    step = with_constraints(rows, answers)
    cut = min(cut, len(given_logits))
    chunks = [slice(0, cut), slice(cut, len(given_logits))]
    changed = torch.cat([constrained(given_logits[c], step.part(c)) for c in chunks])
    expected = torch.tensor(
        [
            by_loop(logits[p - FIRST].tolist(), p - FIRST, answer, row.params.constraints)
            if row.params.constraints is not None
            else logits[p - FIRST].tolist()
            for row, answer, logits in zip(rows, answers, all_logits, strict=True)
            for p in row.positions
        ]
    )
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-5)


def test_rows_that_ask_for_nothing_keep_their_very_logits() -> None:
    logits = torch.randn(3, VOCAB)
    rows = step_rows([row_of(logits, DecodingParams())])
    assert constrain(logits, rows) is logits
    assert ConstraintTable.of([], 1, TEST_DEVICE) is None


def test_a_shorter_vocabulary_is_constrained_as_far_as_it_goes() -> None:
    asked = Constraints(
        logit_bias=((1, 2.0), (VOCAB - 1, 5.0)),
        bad_words=((0, 1), (0, VOCAB - 1)),
        min_tokens=4,
        end_token_ids=(3, VOCAB - 2),
        frequency_penalty=1.0,
        repetition_penalty=2.0,
    )
    logits = torch.randn(2, VOCAB)
    answer = [0, -1, -1, VOCAB - 1]
    row = open_row(answer, torch.cat([logits[:1], logits, logits[:1]]), asked)
    step = with_constraints([row], [answer])
    whole = constrained(logits, step)
    short = constrained(logits[:, : VOCAB - 3], step)
    assert torch.equal(short, whole[:, : VOCAB - 3])
    assert whole.isinf().any()


def held(
    answer: list[int],
    candidates: dict[int, int],
    words: tuple[tuple[int, ...], ...],
    policy: Policy = "threshold",
) -> list[int]:
    """The places that are still accepted of `candidates` (place -> token)."""
    row = open_row(answer, torch.zeros(len(answer), VOCAB), Constraints(bad_words=words), policy)
    step = with_constraints([row], [answer])
    places = [p - FIRST for p in row.positions]
    token = torch.tensor([candidates.get(place, 7) for place in places])
    accept = torch.tensor([place in candidates for place in places])
    kept = hold_back(accept, token, step)
    return [place for place, yes in zip(places, kept.tolist(), strict=True) if yes]


def test_of_a_bad_word_that_would_be_written_together_the_rightmost_token_waits() -> None:
    assert held([-1] * 4, {0: 1, 1: 2, 3: 5}, ((1, 2),)) == [0, 3]
    assert held([-1, 5, -1, -1], {0: 1, 2: 2, 3: 3}, ((1, 5, 2, 3),)) == [0, 2]
    assert held([-1] * 4, {0: 1, 1: 1, 2: 1, 3: 1}, ((1, 1),)) == [0, 2]


def test_what_completes_no_bad_word_is_accepted() -> None:
    assert held([-1] * 4, {0: 1, 1: 3, 3: 2}, ((1, 2), (7, 2))) == [0, 1, 3]
    assert held([-1, -1], {0: 1, 1: 2}, ((5,),)) == [0, 1]


def test_of_a_draft_everything_behind_the_bad_word_waits_too() -> None:
    assert held([-1] * 5, {i: i for i in range(5)}, ((1, 2),), "apd") == [0, 1]


def test_an_edit_waits_before_a_mask() -> None:
    assert held([7, -1, -1], {0: 1, 1: 2, 2: 5}, ((1, 2),), "edit") == [1, 2]


@settings(max_examples=100, deadline=None)
@given(
    answer=st.lists(st.sampled_from([-1, -1, -1, 0, 1]), min_size=1, max_size=8),
    words=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=3).map(tuple), max_size=4),
    data=st.data(),
)
def test_no_bad_word_is_left_and_something_is_written(answer, words, data) -> None:
    """Where no single token completes one, as `constrain` sees to."""
    masks = [i for i, token in enumerate(answer) if token < 0]
    assume(masks)
    candidates = {}
    for place in masks:
        token = data.draw(st.sampled_from([0, 1, 2]))
        alone = [*answer[:place], token, *answer[place + 1 :]]
        if data.draw(st.booleans()) and not complete(alone, words, place):
            candidates[place] = token
    kept = held(answer, candidates, tuple(words))
    text = [candidates[i] if i in kept else token for i, token in enumerate(answer)]
    assert not any(complete(text, words, place) for place in kept)
    assert set(kept) <= candidates.keys()
    assert bool(kept) == bool(candidates)


def complete(text: list[int], words: list[tuple[int, ...]], place: int) -> bool:
    return any(
        tuple(text[start : start + len(word)]) == word
        for word in words
        for start in range(max(0, place - len(word) + 1), place + 1)
    )


def test_rows_are_held_back_each_on_its_own() -> None:
    """A neighbour without bad words, in front, moves nothing."""
    logits = torch.zeros(3, VOCAB)
    rows = [
        open_row([-1, -1, -1], logits, None),
        open_row([-1, -1, -1], logits, Constraints(bad_words=((1, 2),))),
        open_row([-1, -1, -1], logits, Constraints(bad_words=((2, 1),))),
    ]
    step = with_constraints(rows, [[-1, -1, -1]] * 3)
    token = torch.tensor([1, 2, 1] * 3)
    kept = hold_back(torch.ones(9, dtype=torch.bool), token, step)
    assert kept.reshape(3, 3).tolist() == [
        [True, True, True],
        [True, False, True],
        [True, True, False],
    ]
