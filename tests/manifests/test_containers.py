"""The server's containers: arguments that our command line takes, and a pod that is locked down."""

from __future__ import annotations

import pytest

from tests.manifests.containers import (
    ServerContainer,
    make_pod_files,
    runtimes,
    server_containers,
)
from tests.manifests.tools import documents, rendered
from vdiff_kserve.config import ServerConfig, parse_args

WRITABLE = ("/dev/shm", "/tmp", "/var/cache/vdiff")


@pytest.fixture(scope="module")
def pod_files(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pod")
    make_pod_files(folder)
    return folder


def configuration(container: ServerContainer, pod_files) -> ServerConfig:
    return parse_args(container.local_args(pod_files), container.env)


def each_container():
    return pytest.mark.parametrize(
        "container", server_containers(), ids=lambda container: container.origin
    )


@each_container()
def test_arguments_and_environment_are_what_the_server_takes(container, pod_files):
    config = configuration(container, pod_files)
    assert config.model_name == container.model_name
    assert config.port == container.port
    assert not config.kserve.enable_grpc


@each_container()
def test_probes_ask_the_port_that_the_server_listens_on(container, pod_files):
    config = configuration(container, pod_files)
    for probe in container.probes.values():
        assert probe["port"] == config.port
        assert probe.get("scheme", "HTTP") == ("HTTPS" if config.kserve.ssl_certfile else "HTTP")
    assert container.probes["readiness"]["path"] == "/health"
    assert container.probes["liveness"]["path"] == "/v2/health/live"
    startup = container.spec["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


@each_container()
def test_a_pod_lives_longer_than_the_grace_period(container, pod_files):
    seconds = container.pod.get("terminationGracePeriodSeconds")
    if seconds is None:
        seconds = container.pod.get("timeout", 60)  # Knative's; a runtime cannot say
    assert seconds > configuration(container, pod_files).grace_period


@each_container()
def test_no_request_outlives_the_gateway_s_patience(container, pod_files):
    timeout = configuration(container, pod_files).request_timeout
    assert timeout is not None
    assert timeout <= container.pod.get("timeout", 600)


@each_container()
def test_the_container_is_locked_down(container):
    assert container.spec["securityContext"] == LOCKED


def test_the_download_job_is_locked_down():
    jobs = documents("Job")
    assert jobs
    for _, job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["securityContext"] == LOCKED


LOCKED = {
    "runAsNonRoot": True,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@each_container()
def test_every_folder_that_is_written_is_a_bounded_volume(container):
    mounts = {each["name"]: each["mountPath"] for each in container.spec["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(WRITABLE)
    volumes = {each["name"]: each for each in container.pod["volumes"]}
    for name, path in mounts.items():
        assert "sizeLimit" in volumes[name]["emptyDir"], path
    for variable in ("HOME", "HF_HOME"):
        assert container.env[variable].startswith(WRITABLE)


@each_container()
def test_memory_and_cpu_are_bounded(container):
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(container.spec["resources"][kind])


def test_services_name_a_runtime_and_a_format_that_exist():
    for folder, service in documents("InferenceService"):
        model = service["spec"]["predictor"]["model"]
        formats = {each["name"] for each in runtimes()[model["runtime"]]["spec"][FORMATS]}
        assert model["modelFormat"]["name"] in formats, folder


FORMATS = "supportedModelFormats"


def test_the_runtime_takes_over_no_format_of_others():
    chosen = {
        each["name"]: each["autoSelect"] for each in runtimes()["vdiff-runtime"]["spec"][FORMATS]
    }
    assert chosen == {"vdiff": True, "llada": True, "dream": True, "huggingface": False}
    assert not any(each["autoSelect"] for each in runtimes()["vdiff-runtime-cpu"]["spec"][FORMATS])
    for runtime in runtimes().values():
        assert runtime["spec"]["protocolVersions"] == ["v1", "v2"]


def test_gpu_pods_ask_for_a_gpu():
    for container in server_containers():
        if "InferenceService" in container.origin and "--device=cpu" not in container.args:
            for kind in ("requests", "limits"):
                assert container.spec["resources"][kind]["nvidia.com/gpu"] == "1"


def test_prometheus_finds_the_metrics_by_either_family_of_annotations():
    for runtime in runtimes().values():
        annotations = runtime["spec"]["annotations"]
        (port,) = runtime["spec"]["containers"][0]["ports"]
        for family in ("prometheus.io", "prometheus.kserve.io"):
            assert annotations[f"{family}/port"] == str(port["containerPort"])
            assert annotations[f"{family}/path"] == "/metrics"


def test_cluster_runtimes_differ_in_kind_only():
    cluster = {each["metadata"]["name"]: each for each in rendered("runtimes/cluster")}
    assert {each["kind"] for each in cluster.values()} == {"ClusterServingRuntime"}
    assert {name: each["spec"] for name, each in cluster.items()} == {
        each["metadata"]["name"]: each["spec"] for each in rendered("runtimes")
    }
