"""KServe's V1 and V2 protocols, over REST and gRPC."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.server.process import ServerProcess

V1 = "/v1/models/tiny:predict"
V2 = "/v2/models/tiny/infer"
PARAMETERS = {"max_tokens": 8, "temperature": 1.0, "seed": 4, "ignore_eos": True}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def rpc(server: ServerProcess) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield GRPCInferenceServiceStub(channel)


def completion(http: httpx.Client, prompt: str) -> str:
    body = {"prompt": prompt} | PARAMETERS
    return http.post("/v1/completions", json=body).json()["choices"][0]["text"]


def tensor(*prompts: str) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "prompt", "datatype": "BYTES", "shape": [len(prompts)], "data": list(prompts)}
        ],
        "parameters": PARAMETERS,
    }


def outputs(body: dict[str, Any]) -> dict[str, Any]:
    return {o["name"]: o["data"] for o in body["outputs"]}


def test_v1_answers_prompts_and_objects(http: httpx.Client) -> None:
    instances = ["go", {"prompt": "go"}, {"messages": HI, "parameters": {"max_tokens": 4}}]
    body = {"instances": instances, "parameters": PARAMETERS}
    response = http.post(V1, json=body)
    assert response.status_code == 200, response.text
    plain, prompted, chat = response.json()["predictions"]
    assert plain == completion(http, "go") == prompted["text"]
    assert prompted["finish_reason"] == "length"
    assert prompted["completion_tokens"] == prompted["nfe"] == 8
    assert chat["completion_tokens"] == 4


def test_v1_gives_all_texts_of_an_object_with_n(http: httpx.Client) -> None:
    body = {"instances": [{"prompt": "go", "n": 2}], "parameters": PARAMETERS}
    (prediction,) = http.post(V1, json=body).json()["predictions"]
    assert prediction["texts"][0] == prediction["text"] == completion(http, "go")
    assert len(prediction["texts"]) == 2


def test_v1_reads_json_with_a_charset(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = http.post(V1, content=b'{"instances": ["go"]}', headers=headers)
    assert response.status_code == 200
    response = http.post(V1, content=b'{"instances": ', headers=headers)
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "instances must be"),
        ({"instances": []}, "instances must be"),
        ([], "object with instances"),
        ({"instances": [3]}, "instances.0"),
        ({"instances": [{}]}, "instances.0"),
        ({"instances": [{"prompt": "x", "parameters": 3}]}, "instances.0.parameters"),
        ({"instances": [{"messages": 3}]}, "messages"),
        ({"instances": ["x"], "parameters": [1]}, "parameters must be"),
        (
            {"instances": ["x"], "parameters": {"temperature": 9}},
            "temperature must be a number from 0 to 2",
        ),
        ({"instances": ["x"], "parameters": {"temperature": "warm"}}, "temperature"),
        (
            {"instances": ["x"], "parameters": {"prompt_embeds": "x"}},
            "`prompt_embeds` is not supported",
        ),
        ({"instances": ["x" * 300]}, "maximum context length is 256"),
    ],
)
def test_v1_says_what_is_wrong(http: httpx.Client, body: Any, said: str) -> None:
    response = http.post(V1, json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]


def test_v1_model_and_list(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["models"] == ["tiny", "ref"]
    one = http.get("/v1/models/ref").json()
    assert one["name"] == "ref"
    assert one["ready"] is True
    assert http.post("/v1/models/nope:predict", json={"instances": ["x"]}).status_code == 404
    assert http.post("/v1/models/tiny:explain", json={"instances": ["x"]}).status_code == 404


def test_v2_answers_a_tensor_of_prompts(http: httpx.Client) -> None:
    response = http.post(V2, json=tensor("go", "to") | {"id": "mine"})
    assert response.status_code == 200, response.text
    assert response.json()["id"] == "mine"
    data = outputs(response.json())
    assert data["text"] == [completion(http, "go"), completion(http, "to")]
    assert data["finish_reason"] == ["length", "length"]
    assert data["completion_tokens"] == data["nfe"] == [8, 8]


def test_v2_answers_a_binary_tensor(http: httpx.Client) -> None:
    prompt = InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array(["go"], dtype=object), binary_data=True)
    body, json_length = InferRequest("tiny", [prompt], parameters=PARAMETERS).to_rest()
    headers = {
        "Inference-Header-Content-Length": str(json_length),
        "Content-Type": "application/octet-stream",
    }
    response = http.post(V2, content=body, headers=headers)
    assert response.status_code == 200, response.text
    assert outputs(response.json())["text"] == [completion(http, "go")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": []}, "one tensor of prompts"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": [{"name": "p", "datatype": "INT32", "shape": [1], "data": [1]}]}, "BYTES"),
        ({"inputs": [{"name": "p", "datatype": "BYTES", "shape": [3], "data": ["x"]}]}, "shape"),
        ({"inputs": [{"name": "p", "datatype": "BYTES", "shape": [1], "data": [1]}]}, "texts"),
        ({"parameters": {"max_tokens": 0}}, "max_tokens must be in [1, 256]"),
    ],
)
def test_v2_says_what_is_wrong(http: httpx.Client, change: dict[str, Any], said: str) -> None:
    response = http.post(V2, json=tensor("x") | change)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]


def test_v2_metadata_and_health(http: httpx.Client) -> None:
    assert http.get("/v2/models/tiny").json()["inputs"][0]["datatype"] == "BYTES"
    assert http.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/models/nope/ready").status_code == 404


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_the_repository_is_closed(http: httpx.Client, verb: str) -> None:
    response = http.post(f"/v2/repository/models/tiny/{verb}")
    assert response.status_code == 403
    assert "fixed" in response.json()["error"]
    assert http.get("/v2/models/tiny/ready").status_code == 200


def infer_request(*prompts: bytes, **parameters: Any) -> pb.ModelInferRequest:
    given = {
        k: pb.InferParameter(**{("int64_param" if isinstance(v, int) else "string_param"): v})
        for k, v in parameters.items()
    }
    contents = pb.InferTensorContents(bytes_contents=prompts)
    prompt = pb.ModelInferRequest.InferInputTensor(
        name="prompt", datatype="BYTES", shape=[len(prompts)], contents=contents
    )
    return pb.ModelInferRequest(model_name="tiny", id="mine", inputs=[prompt], parameters=given)


def test_grpc_answers(http: httpx.Client, rpc: GRPCInferenceServiceStub) -> None:
    answer = rpc.ModelInfer(
        infer_request(b"go", b"to", max_tokens=8, temperature="1.0", seed=4, ignore_eos=1)
    )
    assert answer.id == "mine"
    texts = next(o for o in answer.outputs if o.name == "text").contents.bytes_contents
    assert [t.decode() for t in texts] == [completion(http, "go"), completion(http, "to")]
    nfe = next(o for o in answer.outputs if o.name == "nfe").contents.int_contents
    assert list(nfe) == [8, 8]


def test_grpc_answers_a_raw_tensor(http: httpx.Client, rpc: GRPCInferenceServiceStub) -> None:
    prompt = InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"go"], dtype=object), binary_data=True)
    request = InferRequest(
        "tiny", [prompt], parameters={"max_tokens": 3, "ignore_eos": True}
    ).to_grpc()
    answer = InferResponse.from_grpc(rpc.ModelInfer(request))
    assert answer.get_output_by_name("completion_tokens").as_numpy().tolist() == [3]


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (infer_request(b"x", max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "[1, 256]"),
        (infer_request(b"\xff"), grpc.StatusCode.INVALID_ARGUMENT, "cannot be read"),
        (pb.ModelInferRequest(model_name="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "one tensor"),
        (pb.ModelInferRequest(model_name="nope"), grpc.StatusCode.NOT_FOUND, "nope"),
    ],
)
def test_grpc_says_what_is_wrong(
    rpc: GRPCInferenceServiceStub, request_: pb.ModelInferRequest, status: Any, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rpc.ModelInfer(request_)
    assert caught.value.code() is status
    assert said in caught.value.details()


def test_grpc_health_and_closed_repository(rpc: GRPCInferenceServiceStub) -> None:
    assert rpc.ServerLive(pb.ServerLiveRequest()).live
    assert rpc.ServerReady(pb.ServerReadyRequest()).ready
    assert rpc.ModelReady(pb.ModelReadyRequest(name="ref")).ready
    with pytest.raises(grpc.RpcError) as caught:
        rpc.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="tiny"))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert rpc.ModelReady(pb.ModelReadyRequest(name="tiny")).ready


def test_v2_and_grpc_write_objects_as_json_texts(
    http: httpx.Client, rpc: GRPCInferenceServiceStub
) -> None:
    asked = json.dumps({"regex": "[0-9]{3}"})
    answer = rpc.ModelInfer(infer_request(b"go", max_tokens=8, structured_outputs=asked))
    (text,) = next(o for o in answer.outputs if o.name == "text").contents.bytes_contents
    assert re.fullmatch("[0-9]{3}", text.decode())
    wrong = tensor("go") | {"parameters": {"structured_outputs": "{"}}
    refused = http.post(V2, json=wrong)
    assert refused.status_code == 400
    assert "structured_outputs must be JSON" in refused.text
    wrong["parameters"] = {"stop_token_ids": [1]}
    refused = http.post(V2, json=wrong)
    assert refused.status_code == 400
    assert refused.text.count("stop_token_ids") == 1
    assert "a list or an object is written as its JSON text" in refused.text


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"inputs": [{}] * 1000}, "inputs must have at most 64 entries, got 1000"),
        (tensor("go") | {"outputs": [{}] * 1000}, "outputs must have at most 64 entries"),
        (
            tensor("go") | {"parameters": {str(i): [] for i in range(1000)}},
            "parameters must have at most 256 entries",
        ),
        (
            {"inputs": [tensor("go")["inputs"][0] | {"shape": ["x"] * 1000}]},
            "shape must have at most 64 entries",
        ),
        ({"inputs": [{}] * 3}, "inputs.0.name: Field required"),
    ],
)
def test_a_v2_request_has_only_so_many_parts(
    http: httpx.Client, body: dict[str, Any], told: str
) -> None:
    refused = http.post(V2, json=body)
    assert refused.status_code == 400
    assert told in refused.json()["error"]


def test_more_prompts_than_can_wait_are_refused_at_once(http: httpx.Client) -> None:
    many = http.post(V1, json={"instances": ["x"] * 21})
    assert many.status_code == 400
    assert "at most 20 prompts, got 21" in many.json()["error"]
    tensors = {"inputs": [{"name": "p", "shape": [21], "datatype": "BYTES", "data": ["x"] * 21}]}
    assert "at most 20 prompts, got 21" in http.post(V2, json=tensors).json()["error"]
