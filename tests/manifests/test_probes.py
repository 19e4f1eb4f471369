"""Servers started with the manifests' own arguments answer the manifests' own probes."""

from __future__ import annotations

import ssl

import httpx
import pytest

from tests.certificate import write_certificate
from tests.manifests.containers import ServerContainer, make_pod_files, server_containers
from tests.server.process import ServerProcess


def distinct() -> list[ServerContainer]:
    """One container of every command line."""
    by_args = {
        tuple(each.replace(container.model_name, "NAME") for each in container.args): container
        for container in server_containers()
    }
    return sorted(by_args.values(), key=lambda container: container.origin)


@pytest.mark.parametrize("container", distinct(), ids=lambda container: container.origin)
def test_a_real_server_answers_the_probes(container, tmp_path, monkeypatch):
    make_pod_files(tmp_path)
    certificate = write_certificate(tmp_path / "var/run/kserve/tls")
    for name, value in container.env.items():
        if name not in ("HOME", "HF_HOME"):
            monkeypatch.setenv(name, value)
    # The address stays ours: the pod's port may be taken here.
    arguments = [each for each in container.local_args(tmp_path) if not each.startswith("--port=")]
    with ServerProcess(*arguments) as process:
        url = process.wait_until_ready().url
        assert {each.get("scheme", "HTTP") for each in container.probes.values()} == {
            url.partition(":")[0].upper()
        }
        with httpx.Client(
            base_url=url, verify=ssl.create_default_context(cafile=certificate), timeout=30
        ) as client:
            for name, probe in container.probes.items():
                assert client.get(probe["path"]).status_code == 200, name
            assert client.get("/metrics").status_code == 200
            for model_name in names(container):
                answer = client.post(
                    "/v1/chat/completions",
                    json={
                        "model": model_name,
                        "messages": [{"role": "user", "content": "What is 17 + 25?"}],
                        "max_tokens": 8,
                    },
                )
                assert answer.status_code == 200, answer.text


def names(container: ServerContainer) -> list[str]:
    served = [each.partition("=")[2] for each in container.args if "--served_model_name" in each]
    return [container.model_name, *served]
