"""What Prometheus is told: the page of all metrics, and what is set once a model is loaded."""

from __future__ import annotations

from prometheus_client import REGISTRY, generate_latest

from vdiff_kserve import __version__
from vdiff_kserve.engine import GenerationEngine
from vdiff_kserve.observability import families
from vdiff_kserve.observability.requests import metrics_of
from vdiff_kserve.observability.vllm import VLLMCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

vllm = VLLMCollector()
REGISTRY.register(vllm)


def watch_engine(model_name: str, engine: GenerationEngine) -> None:
    """Read the gauges of the queue and the cache from the engine whenever they are asked for, and
    show the counters of requests at zero."""
    metrics_of(model_name)
    families.RUNNING.labels(model_name).set_function(lambda: engine.num_running)
    families.WAITING.labels(model_name).set_function(lambda: engine.num_waiting)
    families.STUCK.labels(model_name).set_function(lambda: engine.stuck)
    families.KV_USED.labels(model_name).set_function(lambda: engine.kv_tokens_used)
    families.KV_TOTAL.labels(model_name).set_function(lambda: engine.kv_tokens_total)
    vllm.block_lengths[model_name] = engine.spec.block_length


def forget_engine(model_name: str) -> None:
    """Read nothing more from a model's engine, so that its memory can be freed."""
    for gauge in (
        families.RUNNING,
        families.WAITING,
        families.STUCK,
        families.KV_USED,
        families.KV_TOTAL,
    ):
        gauge.labels(model_name).set_function(lambda: 0)


def model_loaded(model_name: str, seconds: float, **facts: str) -> None:
    """Tell what was loaded and how long it took.

    Args:
        facts: labels of `vdiff_model_info`, beside the name and this server's version.
    """
    families.LOAD_SECONDS.labels(model_name).set(seconds)
    families.MODEL_INFO.labels(model_name).info({**facts, "version": __version__})


def render() -> bytes:
    """Every metric of the process in Prometheus's text format."""
    return generate_latest(REGISTRY)
