"""vLLM's names over our numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.observability.test_rounds import REPORT
from vdiff_kserve.observability import metrics
from vdiff_kserve.observability.requests import metrics_of
from vdiff_kserve.observability.rounds import RoundMetrics

MODEL = "twin"


@pytest.fixture(scope="module")
def engine() -> SimpleNamespace:
    """A queue and a cache to look at."""
    engine = SimpleNamespace(
        num_running=3,
        num_waiting=5,
        kv_tokens_used=250,
        kv_tokens_total=1000,
        stuck=False,
        spec=SimpleNamespace(block_length=32),
    )
    metrics.watch_engine(MODEL, engine)
    return engine


def scraped(name: str, **labels: str) -> float:
    """The value of one series of the model, as a scraper reads it."""
    wanted = {"model_name": MODEL, **labels}
    values = [
        sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == name and wanted.items() <= sample.labels.items()
    ]
    (value,) = values
    return value


def test_the_queue_has_vllms_labels(engine: SimpleNamespace) -> None:
    assert scraped("vllm:num_requests_running", engine="0") == 3
    assert scraped("vllm:num_requests_waiting", engine="0") == 5
    engine.num_running = 4
    assert scraped("vllm:num_requests_running", engine="0") == 4


def test_cache_usage_is_a_share_and_the_size_is_in_blocks(engine: SimpleNamespace) -> None:
    assert scraped("vdiff_kv_slots_used") == 250
    assert scraped("vdiff_kv_slots_total") == 1000
    assert scraped("vllm:kv_cache_usage_perc", engine="0") == 0.25
    config = {"engine": "0", "block_size": "32", "num_gpu_blocks": "31"}
    assert scraped("vllm:cache_config_info", **config) == 1


def test_a_cache_without_room_is_not_used(engine: SimpleNamespace) -> None:
    engine.kv_tokens_total, engine.kv_tokens_used = 0, 0
    try:
        assert scraped("vllm:kv_cache_usage_perc") == 0
    finally:
        engine.kv_tokens_total, engine.kv_tokens_used = 1000, 250


def test_answers_are_told_by_finished_reason() -> None:
    own = metrics_of(MODEL)
    own.ended("stop", 2)
    own.ended("abort")
    for reason, count in {"stop": 2, "length": 0, "abort": 1, "error": 0}.items():
        assert scraped("vdiff_answers_total", finish_reason=reason) == count
        assert scraped("vllm:request_success_total", engine="0", finished_reason=reason) == count


def test_histograms_are_copied_bucket_by_bucket() -> None:
    own = metrics_of(MODEL)
    own.latency.observe(0.3)
    own.latency.observe(3)
    assert scraped("vllm:e2e_request_latency_seconds_bucket", le="0.5", engine="0") == 1
    assert scraped("vllm:e2e_request_latency_seconds_bucket", le="+Inf", engine="0") == 2
    assert scraped("vllm:e2e_request_latency_seconds_count", engine="0") == 2
    assert scraped("vllm:e2e_request_latency_seconds_sum", engine="0") == pytest.approx(3.3)


def test_denoising_is_counted_in_vllms_units() -> None:
    RoundMetrics(MODEL).observe(REPORT)
    assert scraped("vllm:diffusion_num_denoising_steps_total", engine="0") == REPORT.rows
    assert scraped("vllm:diffusion_num_canvas_positions_total", engine="0") == REPORT.computed
    assert scraped("vllm:diffusion_num_committed_tokens_total", engine="0") == REPORT.committed


@pytest.mark.usefixtures("engine")
def test_names_keep_their_colons() -> None:
    page = metrics.render().decode()
    assert "\nvllm:num_requests_running{" in page
    assert "vllm_" not in page
    assert "_created" not in page
