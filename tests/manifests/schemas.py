"""Strict schemas of every kind in `manifests/`: a field that does not exist is an error.

KServe's kinds come from its CRDs, Kubernetes' own from kubernetes-validate. The few fields of other
projects' kinds that the manifests use are described here from those projects' documentation.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, Literal

import kubernetes_validate
import yaml
from jsonschema import Draft4Validator
from pydantic import BaseModel, ConfigDict, Field

from tests.manifests.tools import CRDS, missing

KUBERNETES = "1.33"


def problems(document: dict) -> list[str]:
    """What is wrong with a document, as text."""
    group = document["apiVersion"].partition("/")[0]
    if group == "serving.kserve.io":
        return _problems_by_crd(document)
    if document["kind"] in OTHER_KINDS:
        return _problems_by_model(document)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [error.message]
    return []


def _problems_by_crd(document: dict) -> list[str]:
    _, _, version = document["apiVersion"].partition("/")
    versions = _crd_validators(document["kind"])
    if version not in versions:
        return [f"{document['kind']} has no version {version}"]
    errors = versions[version].iter_errors(document)
    return [f"{'/'.join(map(str, each.path))}: {each.message[:200]}" for each in errors]


@cache
def _crd_validators(kind: str) -> dict[str, Draft4Validator]:
    file = CRDS / f"serving.kserve.io_{kind.lower()}s.yaml"
    if not file.is_file():
        missing(f"{file.name} of KServe is not in {CRDS} (set VDIFF_CRDS_DIR)")
    crd = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    assert crd["spec"]["names"]["kind"] == kind
    return {
        each["name"]: Draft4Validator(strict(each["schema"]["openAPIV3Schema"]))
        for each in crd["spec"]["versions"]
    }


def strict(schema: dict) -> dict:
    """A copy that forbids every field it does not name.

    The metadata of objects stays open: Kubernetes itself defines it.
    """
    schema = copy.deepcopy(schema)
    _close(schema)
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key == "properties":
            for each in value.values():
                _close(each)
        else:
            _close(value)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(_Closed):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Expression(_Closed):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class _Selector(_Closed):
    matchLabels: dict[str, str] = {}
    matchExpressions: list[_Expression] = []


class _Relabeling(_Closed):
    targetLabel: str
    sourceLabels: list[str] = []
    replacement: str | None = None


class _Endpoint(_Closed):
    targetPort: int
    path: str
    interval: str = Field(pattern=r"^\d+s$")
    scheme: Literal["http", "https"]
    relabelings: list[_Relabeling] = []


class _PodMonitorSpec(_Closed):
    selector: _Selector
    podMetricsEndpoints: list[_Endpoint]


class _ServiceMonitorSpec(_Closed):
    selector: _Selector
    endpoints: list[_Endpoint]


class _Rule(_Closed):
    alert: str = Field(pattern=r"^Vdiff[A-Za-z0-9]+$")
    expr: str
    for_: str = Field(alias="for", pattern=r"^\d+m$")
    labels: dict[str, str]
    annotations: dict[Literal["summary", "description", "runbook_url"], str]


class _RuleGroup(_Closed):
    name: str
    rules: list[_Rule]


class _RuleSpec(_Closed):
    groups: list[_RuleGroup]


class PodMonitor(_Closed):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: str
    metadata: Metadata
    spec: _PodMonitorSpec


class ServiceMonitor(_Closed):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: str
    metadata: Metadata
    spec: _ServiceMonitorSpec


class PrometheusRule(_Closed):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: str
    metadata: Metadata
    spec: _RuleSpec


class Template(_Closed):
    apiVersion: Literal["template.openshift.io/v1"]
    kind: str
    metadata: Metadata
    objects: list[dict[str, Any]]


OTHER_KINDS: dict[str, type[BaseModel]] = {
    each.__name__: each for each in (PodMonitor, ServiceMonitor, PrometheusRule, Template)
}


def _problems_by_model(document: dict) -> list[str]:
    try:
        read = OTHER_KINDS[document["kind"]].model_validate(document)
    except ValueError as error:
        return [str(error)]
    if isinstance(read, Template):
        return [problem for each in read.objects for problem in problems(each)]
    return []
