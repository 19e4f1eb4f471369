"""Reading `/metrics` as a scraper does."""

from __future__ import annotations

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


class Page:
    """One answer of `/metrics`."""

    def __init__(self, url: str) -> None:
        self.text = httpx.get(f"{url}/metrics", timeout=60).text

    @property
    def families(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.text))

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        values = [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert values, f"{name} {labels} is not on the page"
        return sum(values)


class Counts:
    """How far counters have come since this was made."""

    def __init__(self, url: str, *series: tuple[str, dict[str, str]]) -> None:
        self._url = url
        self._series = series
        self._before = self._read()

    def _read(self) -> list[float]:
        page = Page(self._url)
        return [page.value(name, **labels) for name, labels in self._series]

    def read(self) -> dict[str, float]:
        """What was counted, by `name` or `name/label/label`."""
        keys = ["/".join([name, *labels.values()]) for name, labels in self._series]
        now = self._read()
        return {k: n - b for k, n, b in zip(keys, now, self._before, strict=True)}
