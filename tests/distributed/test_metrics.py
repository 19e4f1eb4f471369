"""The page about replicas has their metrics as the code has them."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from vdiff_kserve.observability import replicas
from vdiff_kserve.observability.families import MODEL

PAGE = Path(__file__).parents[2] / "docs/scaling.md"


def rows() -> list[str]:
    lines = []
    for family in vars(replicas).values():
        if isinstance(family, MetricWrapperBase):
            (told,) = family.collect()
            name = f"{told.name}_total" if told.type == "counter" else told.name
            labels = ", ".join(f"`{label}`" for label in family._labelnames if label not in MODEL)
            lines.append(f"| `{name}` | {told.type} | {labels} | {told.documentation} |")
    return lines


def test_the_document_has_the_table_as_the_code_has_it() -> None:
    table = "\n".join(rows())
    assert len(rows()) >= 9
    assert f"|\n{table}\n" in PAGE.read_text(encoding="utf-8"), f"should be:\n{table}"
