"""What infilling and predictions are worth, on a few of the benchmarks' items."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.infilling import gaps, measure
from benchmarks.prediction import POLICIES, edits
from benchmarks.prediction import measure as measure_edits
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.loading import LoadedModel, load_model
from vdiff_kserve.openai.service import GenerationService


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    loaded = load_model(ServerConfig(device="cpu"))
    yield loaded
    loaded.engine.stop()


@pytest.fixture
def service(model: LoadedModel) -> GenerationService:
    return GenerationService(model.engine, model.tokenizer, model.limits, "embedded")


async def test_automatic_lengths_find_what_a_wrong_length_spoils(
    service: GenerationService, model: LoadedModel
) -> None:
    items = gaps(8, model)
    right = await measure(service, items, 0, 0.9)
    automatic = await measure(service, items, None, 0.9)
    wrong = await measure(service, items, 3, 0.9)
    assert right.right >= 7
    assert automatic.right >= 7
    assert wrong.right <= 2


async def test_a_prediction_saves_passes_on_edits_and_costs_no_right_answer(
    service: GenerationService,
) -> None:
    items = edits(4)
    decoding = POLICIES["threshold 0.9"]
    plain = await measure_edits(service, items, decoding, predicts=False)
    predicted = await measure_edits(service, items, decoding, predicts=True)
    edited = ("another name", "wrong words")
    assert sum(predicted[k].passes for k in edited) < sum(plain[k].passes for k in edited)
    assert sum(s.right for s in predicted.values()) >= sum(s.right for s in plain.values()) - 1
    assert all(predicted[kind].accepted > predicted[kind].rejected for kind in edited)
    assert predicted["unrelated"].passes <= plain["unrelated"].passes + 3 * 4
