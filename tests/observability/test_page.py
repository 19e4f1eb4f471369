"""`/metrics` and the page about it."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from tests.observability.page import LABELS, label_table, our_table, vllm_table
from tests.observability.scrape import Page
from tests.server.process import ServerProcess

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
HEAD = "|---|---|---|---|\n"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.fixture(scope="module")
def page(server: ServerProcess) -> Page:
    return Page(server.url)


@pytest.mark.parametrize("table", [label_table, our_table, vllm_table])
def test_the_document_has_the_tables_as_the_code_has_them(table) -> None:
    rows = "\n".join(table())
    assert f"|\n{rows}\n\n" in DOCUMENT, f"should be:\n{rows}"


def test_every_name_in_the_document_is_served_and_the_other_way_round(page: Page) -> None:
    documented = set(re.findall(r"^\| `((?:vdiff_|vllm:)[\w:]+)` \|", DOCUMENT, re.MULTILINE))
    served = set(re.findall(r"^# TYPE (\S+) ", page.text, re.MULTILINE))
    own = {name for name in served if name.startswith(("vdiff_", "vllm"))}
    assert own == documented
    for name in served - own:
        assert name.startswith(("python_", "process_")) or f"`{name}`" in DOCUMENT, name


def test_every_series_is_there_before_it_is_counted(server: ServerProcess, page: Page) -> None:
    """Else the first event of a kind would not be seen as a rise."""
    for family in page.families:
        if family.name.startswith(("vdiff_", "vllm:")):
            assert family.samples, family.name
    reasons = {
        sample.labels["finished_reason"]
        for family in page.families
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    }
    assert reasons == set(LABELS["finish_reason"])


def test_labels_have_no_values_but_the_documented_ones(server: ServerProcess) -> None:
    for model in ("nobody", "llada"):
        body = {"prompt": "x", "model": model, "user": "someone", "request_id": "mine"}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    for family in Page(server.url).families:
        for sample in family.samples:
            if sample.name.startswith(("vdiff_", "vllm:")):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "llada"
                assert labels.pop("engine", "0") == "0"
                for label in labels.keys() & LABELS.keys():
                    assert labels.pop(label) in LABELS[label]
                allowed = {"le", "finished_reason", "block_size", "num_gpu_blocks"}
                allowed |= {"family", "dtype", "device", "max_model_len", "version"}
                assert labels.keys() <= allowed, sample


def test_names_keep_their_colons_whatever_the_scraper_accepts(server: ServerProcess) -> None:
    for accepted in (OPEN_METRICS, f"{OPEN_METRICS};escaping=underscores", "text/plain", "*/*"):
        response = httpx.get(f"{server.url}/metrics", headers={"Accept": accepted})
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "\nvllm:num_requests_running{" in response.text
        assert "vllm_" not in response.text


def test_the_model_is_described(page: Page) -> None:
    facts = {"family": "llada", "device": "cpu", "max_model_len": "512"}
    assert page.value("vdiff_model_info", **facts) == 1
    assert page.value("vdiff_model_load_seconds") > 0
    assert page.value("vdiff_kv_slots_total") == 4 * 512
    assert page.value("vllm:cache_config_info", block_size="32", num_gpu_blocks="64") == 1
