"""The same numbers under vLLM's names, for autoscalers, routers and dashboards made for it.

Nothing is counted here: every family is made from ours when it is asked for. Names, types, units
and the labels `model_name`, `engine` and `finished_reason` are those of vLLM's
`vllm/v1/metrics/loggers.py`, and of `vllm/v1/spec_decode/metrics.py` for `vllm:diffusion_*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from vdiff_kserve.observability import families

ENGINE = {"engine": "0"}
TWINS: dict[str, MetricWrapperBase] = {
    "vllm:num_requests_running": families.RUNNING,
    "vllm:num_requests_waiting": families.WAITING,
    "vllm:prompt_tokens": families.PROMPT_TOKENS,
    "vllm:generation_tokens": families.GENERATION_TOKENS,
    "vllm:request_success": families.ANSWERS,
    "vllm:request_prompt_tokens": families.ANSWER_PROMPT_TOKENS,
    "vllm:request_generation_tokens": families.ANSWER_GENERATION_TOKENS,
    "vllm:e2e_request_latency_seconds": families.LATENCY,
    "vllm:request_queue_time_seconds": families.QUEUE_TIME,
    "vllm:request_inference_time_seconds": families.RUNNING_TIME,
    "vllm:request_prefill_time_seconds": families.RUNNING_TO_TEXT,
    "vllm:request_decode_time_seconds": families.RUNNING_FROM_TEXT,
    "vllm:time_to_first_token_seconds": families.FIRST_TEXT,
    "vllm:inter_token_latency_seconds": families.INTER_CHUNK,
    "vllm:request_time_per_output_token_seconds": families.TIME_PER_TOKEN,
    "vllm:time_per_output_token_seconds": families.TIME_PER_TOKEN,
    "vllm:prefix_cache_queries": families.PREFIX_QUERIED,
    "vllm:prefix_cache_hits": families.PREFIX_HIT,
    "vllm:diffusion_num_committed_tokens": families.DECODED_TOKENS,
}
"""vLLM's families that have the same shape as one of ours."""


class VLLMCollector(Collector):
    """Our metrics as vLLM would name them.

    Attributes:
        block_lengths: of each model; routers cut prompts into pieces of this many tokens.
    """

    def __init__(self) -> None:
        self.block_lengths: dict[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        """Every family of vLLM's that this server has."""
        for name, ours in TWINS.items():
            yield _twin(name, ours)
        yield _usage()
        yield _cache_config(self.block_lengths)
        yield _steps()
        yield _positions()


def _twin(name: str, ours: MetricWrapperBase) -> Metric:
    (family,) = ours.collect()
    twin = Metric(name, _help(family), family.type)
    for sample in family.samples:
        suffix = sample.name.removeprefix(family.name)
        twin.add_sample(name + suffix, _labels(sample.labels), sample.value)
    return twin


def _steps() -> Metric:
    steps = Metric(
        "vllm:diffusion_num_denoising_steps",
        "vdiff_round_rows_sum: Denoising steps, counted once for each answer that took part.",
        "counter",
    )
    (rounds,) = families.ROUND_ROWS.collect()
    for sample in rounds.samples:
        if sample.name == f"{rounds.name}_sum":
            steps.add_sample(f"{steps.name}_total", _labels(sample.labels), sample.value)
    return steps


def _positions() -> Metric:
    positions = Metric(
        "vllm:diffusion_num_canvas_positions",
        "vdiff_forward_tokens_total: Those with source computed.",
        "counter",
    )
    (tokens,) = families.FORWARD_TOKENS.collect()
    for sample in tokens.samples:
        if sample.labels["source"] == "computed":
            labels = {k: v for k, v in sample.labels.items() if k != "source"}
            positions.add_sample(f"{positions.name}_total", _labels(labels), sample.value)
    return positions


def _usage() -> Metric:
    usage = Metric(
        "vllm:kv_cache_usage_perc",
        "vdiff_kv_slots_used: As a share of vdiff_kv_slots_total.",
        "gauge",
    )
    for used, total in _slots():
        share = used.value / total.value if total.value else 0.0
        usage.add_sample(usage.name, _labels(used.labels), share)
    return usage


def _cache_config(block_lengths: Mapping[str, int]) -> Metric:
    config = Metric(
        "vllm:cache_config_info",
        "vdiff_kv_slots_total: As the number of blocks and their length, in labels; always 1.",
        "gauge",
    )
    for _, total in _slots():
        length = block_lengths.get(total.labels["model_name"])
        if length is not None:
            blocks = {"block_size": str(length), "num_gpu_blocks": str(int(total.value) // length)}
            config.add_sample(config.name, _labels(total.labels) | blocks, 1.0)
    return config


def _slots() -> list[tuple[Sample, Sample]]:
    """Used and all slots of each model."""
    (used,), (total,) = families.KV_USED.collect(), families.KV_TOTAL.collect()
    return list(zip(used.samples, total.samples, strict=True))


def _help(family: Metric) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return f"{name}: {family.documentation}"


def _labels(ours: dict[str, str]) -> dict[str, str]:
    renamed = {"finished_reason" if k == "finish_reason" else k: v for k, v in ours.items()}
    return renamed | ENGINE
