"""The pods of the multi-node runtime become one Ray cluster, which the server joins."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.manifests.containers import runtimes
from tests.manifests.test_containers import LOCKED, WRITABLE
from tests.manifests.tools import rendered
from vdiff_kserve.config import parse_args

RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def spec() -> dict:
    return runtimes()["vdiff-runtime-multinode"]["spec"]


def script(container: dict) -> str:
    shell, flag, text, *_ = container["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    return text


def ray_options(text: str) -> set[str]:
    (command,) = re.findall(r"(ray start .*?)(?:&&|;)", text)
    return {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}


def test_the_options_of_ray_exist(spec: dict) -> None:
    told = subprocess.run([RAY, "start", "--help"], capture_output=True, text=True, check=True)
    for container in (spec["containers"][0], spec["workerSpec"]["containers"][0]):
        for option in ray_options(script(container)):
            assert re.search(rf"{option}\b", told.stdout), option


def test_the_shell_hands_the_arguments_to_the_server(spec: dict) -> None:
    (head,) = spec["containers"]
    server = script(head).partition("exec ")[2].replace("python -m vdiff_kserve", "printf '%s\\n'")
    command = [*head["command"][:2], server, *head["command"][3:], *head["args"]]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    config = parse_args([*told, "--model_dir=."], {})
    assert config.ray_address == "auto"
    assert config.replicas == str(spec["workerSpec"]["pipelineParallelSize"])


def test_workers_find_the_head_where_it_listens(spec: dict) -> None:
    head, worker = script(spec["containers"][0]), script(spec["workerSpec"]["containers"][0])
    port = re.search(r"--port=(\d+)", head)[1]
    assert f'"$HEAD_SVC.$POD_NAMESPACE.svc.cluster.local:{port}"' in worker


def test_all_pods_have_the_same_token(spec: dict) -> None:
    containers = (spec["containers"][0], spec["workerSpec"]["containers"][0])
    tokens = [
        each["valueFrom"]["secretKeyRef"]
        for container in containers
        for each in container["env"]
        if each["name"] == "RAY_AUTH_TOKEN"
    ]
    assert tokens == [{"name": "vdiff-ray", "key": "token"}] * 2


def test_workers_are_locked_down_like_the_server(spec: dict) -> None:
    (worker,) = spec["workerSpec"]["containers"]
    assert worker["securityContext"] == LOCKED
    mounts = {each["mountPath"] for each in worker["volumeMounts"]}
    assert mounts == set(WRITABLE)
    assert all("sizeLimit" in each["emptyDir"] for each in spec["workerSpec"]["volumes"])


def test_the_service_has_what_kserve_asks_of_several_nodes() -> None:
    (service,) = [e for e in rendered("multinode") if e["kind"] == "InferenceService"]
    annotations = service["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "none"
    assert service["spec"]["predictor"]["model"]["storageUri"].startswith(("pvc://", "oci://"))
