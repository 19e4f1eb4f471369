"""The front end's benchmark: its engine answers as the real one does, and its table is whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from benchmarks import frontend
from benchmarks.instant import InstantEngine
from vdiff_kserve import loading
from vdiff_kserve.engine import EngineStoppedError
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.openai.protocol import CompletionRequest


@pytest.fixture
async def model(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DiffusionModel]:
    monkeypatch.setattr(loading, "Engine", loading.Engine)  # put back afterwards
    monkeypatch.setattr(InstantEngine, "tokens_per_chunk", 8)
    model = await frontend.load()
    yield model
    model.stop()


async def test_the_instant_engine_answers_with_the_prompt(model: DiffusionModel) -> None:
    request = CompletionRequest(prompt="round and ", max_tokens=20, return_token_ids=True)
    answer = json.loads((await model.create_completion(request)).model_dump_json())
    choice, prompt = answer["choices"][0], answer["choices"][0]["prompt_token_ids"]
    words = prompt[-1:] if choice["token_ids"][0] == prompt[-1] else prompt
    assert choice["token_ids"][: len(words)] == words
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == 20
    assert choice["finish_reason"] == "length"
    assert choice["text"].startswith("round and round")
    assert answer["vdiff"]["nfe"] == 3


async def test_an_instant_engine_that_was_stopped_says_so(model: DiffusionModel) -> None:
    model.stop()
    with pytest.raises(EngineStoppedError):
        model._engine.submit([])


@pytest.mark.parametrize("way", [frontend.through_service, frontend.through_application])
async def test_a_chat_has_as_many_chunks_as_the_engine_makes(
    model: DiffusionModel, way: object
) -> None:
    InstantEngine.tokens_per_chunk = 32
    assert await way(model)(frontend.body_of(256)) in (7, 8)  # one may end within a character
    cost = await frontend.measure(way(model), (1, 2), requests=1, rounds=1, title="test")
    assert len(cost.milliseconds) == 2


def test_the_table_tells_whether_the_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "CHUNKS", (1, 11))
    cost = frontend.Cost((1, 11), (1.0, 2.0))
    assert cost.line == pytest.approx((0.9, 0.1))
    assert cost.within_budget
    assert not frontend.Cost((1, 11), (2.2, 3.0)).within_budget
    assert "| 11 | 2.00 ms | 3.1 ms |" in frontend.report({"service": cost})
