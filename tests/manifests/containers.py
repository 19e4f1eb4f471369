"""The server containers that the manifests make, put together as KServe puts them together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.manifests.tools import ROOT, documents, rendered

NAMESPACE = "vdiff"
EMBEDDED = ROOT / "vdiff_kserve/embedded"


@dataclass(frozen=True)
class ServerContainer:
    """One container that runs the server, and the pod it is in.

    Attributes:
        origin: where it comes from, for messages.
        model_name: what `{{.Name}}` stands for, which requests use as the model's name.
        spec: the container.
        pod: the fields of its pod that the manifests set.
    """

    origin: str
    model_name: str
    spec: dict[str, Any]
    pod: dict[str, Any]

    @property
    def env(self) -> dict[str, str]:
        given = {each["name"]: each.get("value", NAMESPACE) for each in self.spec["env"]}
        return {name: self._expand(value) for name, value in given.items()}

    @property
    def args(self) -> tuple[str, ...]:
        names = {each["name"]: each.get("value", NAMESPACE) for each in self.spec["env"]}
        return tuple(
            re.sub(r"\$\((\w+)\)", lambda found: names[found[1]], self._expand(each))
            for each in self.spec["args"]
        )

    def _expand(self, text: str) -> str:
        return text.replace("{{.Name}}", self.model_name)

    def local_args(self, files: Path) -> tuple[str, ...]:
        """The arguments with the pod's file paths below `files`."""
        return tuple(
            re.sub(r"=(/mnt/models|/var/run/kserve/tls)", rf"={files}\1", each)
            for each in self.args
        )

    @property
    def port(self) -> int:
        (port,) = self.spec["ports"]
        return port["containerPort"]

    @property
    def probes(self) -> dict[str, dict[str, Any]]:
        return {
            name: self.spec[f"{name}Probe"]["httpGet"]
            for name in ("startup", "readiness", "liveness")
        }


@cache
def runtimes() -> dict[str, dict]:
    found = [*rendered("runtimes"), *rendered("multinode")]
    return {e["metadata"]["name"]: e for e in found if e["kind"] == "ServingRuntime"}


@cache
def server_containers() -> tuple[ServerContainer, ...]:
    """Of every runtime by itself, every InferenceService and every LLMInferenceService."""
    found = []
    for folder, document in documents():
        name = document["metadata"]["name"]
        origin = f"{folder}: {document['kind']} {name}"
        match document["kind"]:
            case "ServingRuntime" | "ClusterServingRuntime":
                found.append(_of_runtime(origin, document))
            case "Template":
                found += [_of_runtime(origin, each) for each in document["objects"]]
            case "InferenceService":
                found.append(_of_service(origin, document))
            case "LLMInferenceService":
                pod = document["spec"]["template"]
                (container,) = [each for each in pod["containers"] if each["name"] == "main"]
                found.append(ServerContainer(origin, name, container, pod))
    return tuple(found)


def _of_runtime(origin: str, runtime: dict) -> ServerContainer:
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    return ServerContainer(origin, runtime["metadata"]["name"], container, runtime["spec"])


def _of_service(origin: str, service: dict) -> ServerContainer:
    """KServe appends the service's arguments to the runtime's; its other fields win."""
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    runtime = _of_runtime(origin, runtimes()[model["runtime"]])
    merged = runtime.spec | {key: model[key] for key in ("resources", "command") if key in model}
    merged["args"] = [*runtime.spec["args"], *model.get("args", [])]
    merged["env"] = [*runtime.spec["env"], *model.get("env", [])]
    name = service["metadata"]["name"]
    return ServerContainer(origin, name, merged, runtime.pod | predictor)


def make_pod_files(folder: Path) -> None:
    """Checkpoints where the pods have theirs, below `folder`."""
    models = folder / "mnt/models"
    _link_files(EMBEDDED, models)
    _link_files(EMBEDDED, models / "dream")
    _link_files(EMBEDDED / "apd", models / "auxiliary")
    (models / "auxiliary/tokenizer.json").symlink_to(EMBEDDED / "tokenizer.json")


def _link_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).symlink_to(file)
