"""Log probabilities: of the unprocessed softmax, of the rows that ask only."""

from __future__ import annotations

import torch

from tests.device import TEST_DEVICE
from tests.sampler.rows import SPECIAL, VOCAB, row_of, step_rows
from vdiff_kserve.sampler import DecodingParams, Logprobs, raw_logprobs, tell

ASKING = DecodingParams(top_logprobs=2, temperature=0.7, top_k=1)


def test_nobody_asks_and_nothing_is_computed() -> None:
    logits = torch.randn(2, VOCAB)
    assert raw_logprobs(logits, step_rows([row_of(logits, DecodingParams())])) is None


def test_the_softmax_is_the_models_own_and_the_mask_is_not_listed() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3)).to(TEST_DEVICE)
    logits[:, SPECIAL.mask] += 4
    rows = step_rows([row_of(logits[:2], DecodingParams()), row_of(logits[2:], ASKING)])
    raw = raw_logprobs(logits, rows)
    token = torch.tensor([0, 1, 2, 3, 4], device=TEST_DEVICE)
    told = tell(raw.clone(), token, rows, SPECIAL.mask)
    expected = logits[2:].log_softmax(-1)
    torch.testing.assert_close(told.chosen, expected.gather(-1, token[2:, None]).squeeze(-1))
    assert not (told.top_tokens == SPECIAL.mask).any()
    expected[:, SPECIAL.mask] = -torch.inf
    ranked = expected.sort(-1, descending=True)
    assert torch.equal(told.top_tokens[:, :5], ranked.indices[:, :5])
    torch.testing.assert_close(told.top[:, :5], ranked.values[:, :5])
    places = (ranked.indices == token[2:, None]).long().argmax(-1) + 1
    assert torch.equal(told.rank, places)


def test_parts_are_joined_in_order() -> None:
    logits = torch.randn(4, VOCAB, device=TEST_DEVICE)
    rows = step_rows([row_of(logits, ASKING)])
    token = torch.tensor([0, 1, 2, 3], device=TEST_DEVICE)
    whole = tell(raw_logprobs(logits, rows), token, rows, SPECIAL.mask)
    parts = []
    for chunk in (slice(0, 1), slice(1, 4)):
        part = rows.part(chunk)
        parts.append(tell(raw_logprobs(logits[chunk], part), token[chunk], part, SPECIAL.mask))
    joined = Logprobs.join(parts)
    assert torch.equal(joined.chosen, whole.chosen)
    assert torch.equal(joined.top_tokens, whole.top_tokens)
