"""What KServe's protocols leave to OpenAI's routes."""

from __future__ import annotations

from typing import Any

import pytest
from kserve import InferInput, InferRequest

from tests.openai.engine import ScriptedEngine, service
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.infer import IN_JSON, infer_v2, predict_v1
from vdiff_kserve.openai.protocol import CompletionRequest


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


async def test_lists_and_objects_of_a_v2_request_are_json_texts() -> None:
    engine = ScriptedEngine(["abc"])
    parameters = {
        "bad_words": '["zz"]',
        "stop_token_ids": "[7]",
        "logit_bias": '{"5": 3}',
        "vllm_xargs": '{"diffusion_max_steps": 2}',
        "prediction": '{"content": "abc"}',
        "stop": "c",
    }
    tensor = InferInput("prompt", [1], "BYTES", ["hi"])
    asked = InferRequest("tiny", [tensor], parameters=parameters)
    answer = await infer_v2(asked, service(engine), "id")
    assert answer.outputs[0].data == ["ab"]
    (request,) = engine.requests
    assert request.decoding.constraints.logit_bias == ((5, 3.0),)
    assert request.decoding.constraints.bad_words
    assert request.decoding.steps == 2
    assert request.end_token_ids[-1] == 7
    assert request.draft


def test_all_lists_and_objects_are_known_as_such() -> None:
    """But those that this route has no use for; a text is a stop string, and names a likelihood."""
    schema = CompletionRequest.model_json_schema()["properties"]
    structured = {
        name
        for name, field in schema.items()
        if {each.get("type", "object") for each in field.get("anyOf", [field])}
        <= {"array", "object", "null"}
    }
    unused = {"kv_transfer_params", "repetition_detection", "stream_options", "likelihood"}
    anything = {f"guided_{kind}" for kind in ("choice", "grammar", "json", "regex")}
    assert structured - unused - anything == IN_JSON
