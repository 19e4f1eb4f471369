"""Every kustomization renders, and every document is valid by a schema that knows its fields."""

from __future__ import annotations

import copy
import re

import pytest

from tests.manifests.schemas import problems
from tests.manifests.tools import MANIFESTS, deployable, documents, kustomizations, rendered

REGISTRY = "registry.example.com/"


@pytest.mark.parametrize("folder", kustomizations())
def test_a_kustomization_renders_valid_documents(folder):
    found = rendered(folder)
    assert found
    for document in found:
        name = f"{document['kind']} {document['metadata']['name']}"
        assert problems(document) == [], f"{name} in {folder}"


def test_every_file_is_part_of_a_kustomization():
    texts = [file.read_text(encoding="utf-8") for file in MANIFESTS.rglob("kustomization.yaml")]
    for file in MANIFESTS.rglob("*.*"):
        if file.name not in ("kustomization.yaml", "README.md"):
            assert any(re.search(rf"^ +- (.*=)?{file.name}$", text, re.M) for text in texts), file


def test_no_kustomization_names_two_objects_alike():
    for folder in kustomizations():
        names = [(each["kind"], each["metadata"]["name"]) for each in rendered(folder)]
        assert len(names) == len(set(names)), folder


def test_the_examples_cover_the_kinds_of_storage_and_scaling():
    found = {
        uri["uri"].partition("://")[0]
        for _, each in documents("InferenceService")
        for uri in storage(each)
    }
    assert {"hf", "pvc", "s3", "oci"} <= found
    scalers = {
        each["metadata"]["annotations"].get("serving.kserve.io/autoscalerClass")
        for _, each in documents("InferenceService")
    }
    assert {"external", "keda"} <= scalers


def storage(service: dict) -> list[dict]:
    predictor = service["spec"]["predictor"]
    uri = predictor["model"].get("storageUri")
    return predictor.get("storageUris", []) + ([{"uri": uri}] if uri else [])


def images(node: object) -> list[str]:
    if isinstance(node, list):
        return [image for each in node for image in images(each)]
    if not isinstance(node, dict):
        return []
    own = [node["image"]] if isinstance(node.get("image"), str) else []
    return own + [image for each in node.values() for image in images(each)]


@pytest.mark.parametrize("folder", [each for each in kustomizations() if deployable(each)])
def test_one_place_names_every_image(folder):
    for document in rendered(folder):
        for image in images(document):
            assert image.startswith(f"{REGISTRY}vdiff/vdiff-kserve:"), image


def test_a_document_is_refused_for_a_field_that_does_not_exist():
    (runtime,) = [each for each in rendered("runtimes") if each["metadata"]["name"][-3:] != "cpu"]
    (service,) = rendered("inferenceservices/llada")
    (job,) = [each for each in rendered("storage") if each["kind"] == "Job"]
    for document, path, value in (
        (runtime, ("spec", "supportedModelFormat"), []),
        (runtime, ("spec", "supportedModelFormats", 0, "priority"), 0),
        (runtime, ("spec", "containers", 0, "securityContext", "runAsNonroot"), True),
        (service, ("spec", "predictor", "minReplica"), 1),
        (service, ("spec", "predictor", "model", "storage_uri"), "hf://a/b"),
        (service, ("spec", "predictor", "model", "modelFormat", "name"), 3),
        (job, ("spec", "template", "spec", "restartpolicy"), "Never"),
    ):
        wrong = copy.deepcopy(document)
        node = wrong
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        assert problems(wrong), path
