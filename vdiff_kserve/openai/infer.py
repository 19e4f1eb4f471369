"""KServe's V1 and V2 inference requests, as completions and chats."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters
from kserve.protocol.rest import v2_datamodels
from pydantic import ValidationError, model_validator

from vdiff_kserve.openai.errors import RequestError, invalid_body
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.responses import FinishedAnswer
from vdiff_kserve.openai.service import GenerationService

OUTPUTS = {
    "text": "BYTES",
    "finish_reason": "BYTES",
    "completion_tokens": "INT32",
    "nfe": "INT32",
}
"""Names and datatypes of the tensors that answer a V2 request; each has one entry per answer."""

IN_JSON = frozenset(
    (
        *("allowed_token_ids", "bad_words", "infill_lengths", "logit_bias", "prediction"),
        *("response_format", "stop_token_ids", "structured_outputs", "vllm_xargs"),
    )
)
"""Parameters that are lists or objects, which V2 requests write as JSON texts."""

AnyRequest = ChatCompletionRequest | CompletionRequest
MAX_TENSORS, MAX_DIMENSIONS, MAX_PARAMETERS = 64, 64, 256
"""Of one V2 request."""


class InferenceRequest(v2_datamodels.InferenceRequest):  # type: ignore[misc]
    """The body of a V2 request: KServe's, with so few parts that not many of them can be wrong.
    Each thing that is costs time and memory, and a body has room for millions."""

    @model_validator(mode="before")
    @classmethod
    def _check_counts(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        tensors: list[Any] = []
        for name in ("inputs", "outputs"):
            given = body.get(name)
            _check_count(name, given, MAX_TENSORS)
            tensors += given if isinstance(given, list) else ()
        for part in [body, *(each for each in tensors if isinstance(each, dict))]:
            _check_count("parameters", part.get("parameters"), MAX_PARAMETERS)
            _check_count("shape", part.get("shape"), MAX_DIMENSIONS)
        return body


def _check_count(name: str, value: Any, most: int) -> None:
    if isinstance(value, list | dict) and len(value) > most:
        raise ValueError(f"{name} must have at most {most} entries, got {len(value)}")


async def predict_v1(
    payload: Any, service: GenerationService, request_id: str
) -> dict[str, list[Any]]:
    """Answer `{"instances": [...], "parameters": {...}}`.

    An instance is a prompt, or an object with `prompt` or `messages` and parameters of its own. A
    prompt's prediction is the text of its answer, an object's is an object.

    Args:
        request_id: for the log, of instances that have none.

    Raises:
        RequestError: the payload is wrong or cannot be answered.
    """
    body = _decoded(payload)
    instances, parameters = body.get("instances"), body.get("parameters") or {}
    if not isinstance(instances, list) or not instances:
        raise RequestError("instances must be a list with at least one entry.", param="instances")
    _check_requests("instances", len(instances), service)
    if not isinstance(parameters, dict):
        raise RequestError("parameters must be an object.", param="parameters")
    parameters = {"request_id": request_id, **parameters}
    requests = [_instance(each, parameters, i) for i, each in enumerate(instances)]
    answers = await service.answer(requests, "v1")
    return {
        "predictions": [
            given[0].text if isinstance(instance, str) else _prediction(given)
            for instance, given in zip(instances, answers, strict=True)
        ]
    }


def _check_requests(field: str, count: int, service: GenerationService) -> None:
    """Refuse more prompts than can wait, before anything is done for each of them."""
    most = service.limits.max_choices
    if count > most:
        raise RequestError(f"{field} must hold at most {most} prompts, got {count}.", param=field)


def _decoded(payload: Any) -> dict[str, Any]:
    """KServe hands over the bare bytes when the content type has a charset."""
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload)
        except ValueError as error:
            raise RequestError(f"The body is not JSON: {error}", param="body") from error
    if not isinstance(payload, dict):
        raise RequestError("The body must be an object with instances.", param="body")
    return payload


def _instance(instance: Any, parameters: Mapping[str, Any], index: int) -> AnyRequest:
    if isinstance(instance, str):
        instance = {"prompt": instance}
    if not isinstance(instance, dict) or not ({"prompt", "messages"} & instance.keys()):
        raise RequestError(
            f"instances.{index} must be a prompt, or an object with prompt or messages.",
            param=f"instances.{index}",
        )
    own = instance.get("parameters") or {}
    if not isinstance(own, dict):
        where = f"instances.{index}.parameters"
        raise RequestError(f"{where} must be an object.", param=where)
    fields = {k: v for k, v in instance.items() if k != "parameters"}
    return _request({**parameters, **own, **fields})


def _request(fields: dict[str, Any]) -> AnyRequest:
    kind = ChatCompletionRequest if "messages" in fields else CompletionRequest
    try:
        request = kind.model_validate({**fields, "stream": False, "stream_options": None})
    except ValidationError as error:
        raise invalid_body(error.errors()) from error
    for name in ("logprobs", "return_token_ids"):
        if getattr(request, name) is not None and getattr(request, name) is not False:
            raise RequestError(
                f"`{name}` has no place in KServe's answers; OpenAI's routes tell it.", param=name
            )
    return request


def _prediction(answers: list[FinishedAnswer]) -> dict[str, Any]:
    first = answers[0]
    prediction = _facts(first)
    if len(answers) > 1:
        prediction["texts"] = [answer.text for answer in answers]
    return prediction


def _facts(answer: FinishedAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.end.completion_tokens,
        "nfe": answer.end.stats.nfe,
    }


def _value(name: str, value: Any) -> Any:
    """A V2 parameter, of which gRPC knows plain values only: others are JSON texts."""
    if name not in IN_JSON or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON: {error}", param=name) from error


async def infer_v2(
    request: InferRequest, service: GenerationService, request_id: str
) -> InferResponse:
    """Answer a V2 request: one BYTES tensor of prompts, the same parameters for all.

    Args:
        request_id: for the log, when the parameters have none.

    Raises:
        RequestError: the request is wrong or cannot be answered.
    """
    if len(request.inputs) != 1 or request.inputs[0].datatype != "BYTES":
        raise RequestError(
            "inputs must hold one tensor of prompts, of datatype BYTES.", param="inputs"
        )
    given = to_http_parameters(request.parameters or {})
    parameters = {"request_id": request_id, **{k: _value(k, v) for k, v in given.items()}}
    prompts = _prompts(request.inputs[0])
    _check_requests("inputs", len(prompts), service)
    requests = [_request({**parameters, "prompt": prompt}) for prompt in prompts]
    answers = [a for given in await service.answer(requests, "v2") for a in given]
    rows = [_facts(answer) for answer in answers]
    return InferResponse(
        response_id=request.id or uuid.uuid4().hex,
        model_name=request.model_name,
        infer_outputs=[
            InferOutput(name, [len(answers)], OUTPUTS[name], [row[name] for row in rows])
            for name in OUTPUTS
        ],
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


def _prompts(tensor: InferInput) -> list[str]:
    """The tensor's texts: JSON gives strings, gRPC and binary bodies give bytes."""
    try:
        items = tensor.as_numpy().flatten().tolist()
        prompts = [each.decode() if isinstance(each, bytes) else each for each in items]
    except (ValueError, TypeError, InvalidInput) as error:
        raise RequestError(
            f"The tensor `{tensor.name}` cannot be read as texts of shape {list(tensor.shape)}.",
            param="inputs",
        ) from error
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise RequestError(f"The tensor `{tensor.name}` must hold texts.", param="inputs")
    return prompts
