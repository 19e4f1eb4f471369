"""A real Prometheus scrapes the server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.observability.scrape import Page
from tests.observability.test_page import DOCUMENT
from tests.server.process import ServerProcess, free_port
from tests.waiting import wait_until

QUERIES = re.findall(r"^\| [A-Z][^|]*\? \| `([^`]+)` \|$", DOCUMENT, re.MULTILINE)
CONFIG = """
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: vdiff
    static_configs:
      - targets: ["{target}"]
"""


class Prometheus:
    """Answers queries about what was scraped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, query: str) -> list[dict]:
        """The series that answer an instant query."""
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()["data"]["result"]

    def value(self, query: str) -> float:
        result = self.query(query)
        return float(result[0]["value"][1]) if result else float("nan")

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        reason = "the program `prometheus` is not installed (Debian's package of that name)"
        assert not os.environ.get("VDIFF_CI"), reason
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(target=server.url.removeprefix("http://")))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}", "--log.level=warn",
        ],
    )  # fmt: skip
    try:
        prometheus = Prometheus(f"http://{address}")
        wait_until(prometheus.is_ready)
        wait_until(lambda: prometheus.value("up") == 1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(60)


def test_it_counts_what_the_server_counts(server: ServerProcess, prometheus: Prometheus) -> None:
    before = Page(server.url).value("vdiff_generation_tokens_total")
    wait_until(lambda: prometheus.value("vdiff_generation_tokens_total") == before)
    body = {"prompt": "What is 2 + 3?", "max_tokens": 16}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    after = before + answer["usage"]["completion_tokens"]
    assert after > before
    wait_until(lambda: prometheus.value("vdiff_generation_tokens_total") == after)
    assert prometheus.value("vllm:generation_tokens_total") == after


def test_it_keeps_vllms_names_and_labels(prometheus: Prometheus) -> None:
    (series,) = prometheus.query("vllm:num_requests_running")
    assert series["metric"]["__name__"] == "vllm:num_requests_running"
    assert series["metric"]["model_name"] == "llada"
    assert series["metric"]["engine"] == "0"
    failed = "sum(increase(vllm:request_success_total{finished_reason=~'error|abort'}[5m]))"
    assert prometheus.value(failed) >= 0
    assert len(prometheus.query("vllm:e2e_request_latency_seconds_bucket{model_name='llada'}")) > 9


def test_every_query_of_the_document_has_an_answer(
    server: ServerProcess, prometheus: Prometheus
) -> None:
    assert len(QUERIES) > 9
    body = {"prompt": "What is 2 + 3?", "max_tokens": 16, "cache": "dual", "block_length": 8}
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    for query in QUERIES:
        wait_until(lambda query=query: prometheus.value(query) >= 0, seconds=20)
