"""What KServe's protocols leave to OpenAI's routes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.openai.engine import ScriptedEngine, service
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.infer import predict_v1


def payload(**fields: Any) -> dict[str, Any]:
    return {"instances": [{"prompt": "hi"}], "parameters": fields}


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"return_token_ids": True}])
async def test_what_the_answer_has_no_place_for_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        await predict_v1(payload(**fields), service(ScriptedEngine()), "id")
    assert caught.value.status == 400
    assert caught.value.param in fields


async def test_constraints_reach_the_engine_from_there_too() -> None:
    engine = ScriptedEngine(["a"])
    fields = payload(logprobs=None, return_token_ids=False, logit_bias={"5": 3})
    answer = await predict_v1(fields, service(engine), "id")
    assert answer["predictions"][0]["text"] == "a"
    assert engine.requests[0].decoding.constraints.logit_bias == ((5, 3.0),)
