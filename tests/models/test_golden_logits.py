"""The native decoder computes what the reference implementations compute."""

import pytest
import torch

from tests.golden import GoldenCase, golden_cases
from vdiff_kserve.models import ForwardBatch, load_decoder

DENSE = {"atol": 5e-4, "rtol": 1e-4}


@pytest.mark.parametrize("case", golden_cases("llada", "logits"), ids=lambda case: case.name)
@torch.inference_mode()
def test_golden_llada_logits(case: GoldenCase) -> None:
    decoder, _ = load_decoder(case.folder)
    input_ids = case.tensor("input_ids")
    mask = case.tensor("attention_mask").bool() if case.has("attention_mask") else input_ids >= 0
    rows = [ids[visible] for ids, visible in zip(input_ids, mask, strict=True)]
    logits = decoder.logits(decoder(ForwardBatch.pack(rows)))
    torch.testing.assert_close(logits, case.tensor("logits")[mask], **DENSE)


@torch.inference_mode()
def test_golden_llada_output_spans_select_the_same_rows() -> None:
    case = golden_cases("llada", "logits")[0]
    decoder, _ = load_decoder(case.folder)
    row = case.tensor("input_ids")[0]
    whole = decoder(ForwardBatch.pack([row, row[:7]]))
    some = decoder(ForwardBatch.pack([row, row[:7]], output_spans=[(2, 3), (0, 4)]))
    expected = torch.cat([whole[2:5], whole[len(row) : len(row) + 4]])
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=1e-5)
