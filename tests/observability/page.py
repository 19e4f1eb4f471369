"""The tables of `docs/monitoring.md`, made from the metrics themselves.

`python -m tests.observability.page` prints them.
"""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from vdiff_kserve.observability import families
from vdiff_kserve.observability.vllm import VLLMCollector

OURS = [each for each in vars(families).values() if isinstance(each, MetricWrapperBase)]
LABELS = {
    "endpoint": families.ENDPOINTS,
    "type": families.ERROR_TYPES,
    "finish_reason": families.FINISH_REASONS,
    "kind": families.FORWARD_KINDS,
    "source": families.TOKEN_SOURCES,
    "phase": families.PHASES,
}
SUFFIXES = {"counter": "_total", "info": "_info"}
TYPES = {"info": "gauge"}


def label_table() -> list[str]:
    """Every label with a fixed set of values."""
    return [f"| `{label}` | {code(values)} |" for label, values in LABELS.items()]


def our_table() -> list[str]:
    """Every metric of ours: name, type, labels beside the model's name, meaning."""
    rows = []
    for metric in OURS:
        (family,) = metric.describe()
        name = family.name + SUFFIXES.get(family.type, "")
        labels = code(label for label in metric._labelnames if label != "model_name")
        kind = TYPES.get(family.type, family.type)
        rows.append(f"| `{name}` | {kind} | {labels} | {family.documentation} |")
    return rows


def vllm_table() -> list[str]:
    """Every name of vLLM's: name, type, and what it is made of."""
    rows = []
    for family in VLLMCollector().collect():
        source, _, how = family.documentation.partition(": ")
        ours = next(m for m in OURS if source.startswith(m.describe()[0].name))
        same = how == ours.describe()[0].documentation
        name = family.name + SUFFIXES.get(family.type, "")
        rows.append(f"| `{name}` | {family.type} | `{source}` | {'' if same else how} |")
    return rows


def code(words) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    for table in (label_table(), our_table(), vllm_table()):
        print("\n".join(table), end="\n\n")
