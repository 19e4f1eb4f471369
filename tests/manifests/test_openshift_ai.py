"""What OpenShift AI's dashboard and controller look for."""

from __future__ import annotations

import json

from tests.manifests.containers import runtimes
from tests.manifests.tools import rendered


def test_the_template_holds_the_runtime_as_it_is():
    (template,) = rendered("rhoai/template")
    (runtime,) = template["objects"]
    assert runtime["kind"] == "ServingRuntime"
    assert runtime["spec"] == runtimes()["vdiff-runtime"]["spec"]


def test_the_dashboard_lists_the_template():
    (template,) = rendered("rhoai/template")
    annotations = template["metadata"]["annotations"]
    assert template["metadata"]["labels"]["opendatahub.io/dashboard"] == "true"
    assert json.loads(annotations["opendatahub.io/modelServingSupport"]) == ["single"]
    assert json.loads(annotations["opendatahub.io/model-type"]) == ["generative"]
    assert annotations["opendatahub.io/apiProtocol"] == "REST"
    (runtime,) = template["objects"]
    metadata = runtime["metadata"]
    assert metadata["labels"]["opendatahub.io/dashboard"] == "true"
    assert json.loads(metadata["annotations"]["opendatahub.io/recommended-accelerators"]) == [
        "nvidia.com/gpu"
    ]
    # The dashboard's charts then ask for vLLM's names, which the server exports too.
    assert runtime["spec"]["annotations"]["opendatahub.io/kserve-runtime"] == "vllm"


def test_the_exposed_service_asks_callers_for_a_token():
    found = {each["kind"]: each for each in rendered("rhoai/exposed")}
    service = found["InferenceService"]
    assert service["metadata"]["labels"]["networking.kserve.io/visibility"] == "exposed"
    assert service["metadata"]["annotations"]["security.opendatahub.io/enable-auth"] == "true"
    (rule,) = found["Role"]["rules"]
    assert rule["resourceNames"] == [service["metadata"]["name"]]
    assert rule["verbs"] == ["get"]
    account = found["ServiceAccount"]["metadata"]["name"]
    (subject,) = found["RoleBinding"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": account}
    token = found["Secret"]["metadata"]["annotations"]["kubernetes.io/service-account.name"]
    assert token == account


def test_the_route_waits_as_long_as_the_service():
    (service,) = [e for e in rendered("rhoai/exposed") if e["kind"] == "InferenceService"]
    timeout = service["metadata"]["annotations"]["haproxy.router.openshift.io/timeout"]
    assert timeout == f"{service['spec']['predictor']['timeout']}s"


def test_the_project_s_alerts_know_the_job_that_openshift_ai_makes():
    documents = rendered("overlays/openshift-ai")
    (service,) = [each for each in documents if each["kind"] == "InferenceService"]
    (rule,) = [each for each in documents if each["kind"] == "PrometheusRule"]
    job = f'job="{service["metadata"]["name"]}-metrics"'
    for each in rule["spec"]["groups"][0]["rules"]:
        assert ("up{" in each["expr"]) == (job in each["expr"])
