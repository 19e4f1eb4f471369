"""Alerts fire when they should, and every query asks for what the running server exports."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.manifests.tools import MANIFESTS, documents, program, rendered
from tests.server.process import ServerProcess
from vdiff_kserve.observability.families import ERROR_TYPES

HERE = Path(__file__).parent
METRIC = re.compile(r"\b((?:vdiff_|vllm:)\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+) *(?:=~|!~|!=|=) *"')
TYPES = re.compile(r'type=~"([^"]*)"')
OF_THE_SCRAPER = {"namespace", "pod", "job"}
"""Labels that Prometheus adds."""


def promtool() -> str:
    return program("promtool", "Debian's package prometheus")


def rule_spec() -> dict:
    (rule,) = [each for each in rendered("monitoring") if each["kind"] == "PrometheusRule"]
    return rule["spec"]


def run_promtool(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [promtool(), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule_spec()), encoding="utf-8")
    tests = tmp_path / "alerts.yaml"
    tests.write_text((HERE / "alerts.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    run_promtool(tmp_path, "check", "rules", "rules.yaml")
    assert "SUCCESS" in run_promtool(tmp_path, "test", "rules", "alerts.yaml")


def test_every_alert_has_a_test_that_sees_it_fire():
    tests = yaml.safe_load((HERE / "alerts.yaml").read_text(encoding="utf-8"))["tests"]
    fired = {
        each["alertname"]
        for test in tests
        for each in test["alert_rule_test"]
        if each["exp_alerts"]
    }
    assert fired == {rule["alert"] for group in rule_spec()["groups"] for rule in group["rules"]}


@cache
def dashboard() -> dict:
    (config,) = [each for each in rendered("monitoring") if each["kind"] == "ConfigMap"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(config["data"]["dashboard.json"])


def dashboard_queries() -> dict[str, str]:
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    }
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            inside = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            found[f"variable {variable['name']}"] = inside[1]
    return found


def all_queries() -> dict[str, str]:
    found = {f"dashboard: {name}": query for name, query in dashboard_queries().items()}
    for group in rule_spec()["groups"]:
        found |= {f"alert: {rule['alert']}": rule["expr"] for rule in group["rules"]}
    for folder, service in documents("InferenceService"):
        for metric in service["spec"]["predictor"].get("autoScaling", {}).get("metrics", []):
            found[f"KEDA: {folder}"] = metric["external"]["metric"]["query"]
    for rule in adapter_rules():
        found["adapter: series"] = rule["seriesQuery"]
        found["adapter: metric"] = rule["metricsQuery"]
    return {
        name: query.replace("$__rate_interval", "5m")
        .replace("<<.LabelMatchers>>", 'namespace="n"')
        .replace("<<.GroupBy>>", "pod")
        for name, query in found.items()
    }


def adapter_rules() -> list[dict]:
    return yaml.safe_load((MANIFESTS / "monitoring/adapter/rules.yaml").read_text())["rules"]


def test_every_query_is_one_that_prometheus_reads(tmp_path):
    rules = [
        {"record": f"query:{index}", "expr": query} for index, query in enumerate(ALL.values())
    ]
    text = yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]})
    (tmp_path / "rules.yaml").write_text(text, encoding="utf-8")
    run_promtool(tmp_path, "check", "rules", "rules.yaml")


ALL = all_queries()


@pytest.fixture(scope="module")
def exported(default_server: ServerProcess) -> dict[str, set[str]]:
    """Labels of every sample that a server which answered a request exports."""
    url = default_server.url
    body = {"prompt": "2 + 2 =", "max_tokens": 4}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize("name", ALL)
def test_a_query_asks_for_metrics_and_labels_that_the_server_exports(name, exported):
    asked = METRIC.findall(ALL[name])
    assert asked or "up{" in ALL[name]
    for metric, matchers in asked:
        assert metric in exported
        labels = set(MATCHER.findall(matchers))
        assert labels <= exported[metric] | OF_THE_SCRAPER, metric
    for grouping in re.findall(r"\bby \(([\w, ]+)\)", ALL[name]):
        labels = set(re.split(r", *", grouping))
        assert labels <= set().union(*(exported[metric] for metric, _ in asked)) | OF_THE_SCRAPER


def test_the_types_of_errors_that_are_asked_for_exist():
    asked = {
        each
        for query in ALL.values()
        for found in TYPES.findall(query)
        for each in found.split("|")
    }
    assert "internal" in asked
    assert asked <= set(ERROR_TYPES)


def test_panels_have_titles_of_their_own_and_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({each["title"] for each in panels}) == len({each["id"] for each in panels})
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
        assert place["x"] + place["w"] <= 24


def test_the_hpa_asks_for_what_the_adapter_makes():
    named = {rule["name"]["as"] for rule in adapter_rules()}
    for _, hpa in documents("HorizontalPodAutoscaler"):
        for metric in hpa["spec"]["metrics"]:
            assert metric["pods"]["metric"]["name"] in named


def test_monitors_find_the_pods_and_the_port():
    runtimes = rendered("runtimes")
    services = [service for _, service in documents("InferenceService")]
    for kind, field in (("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")):
        (_, monitor), *_ = documents(kind)
        (endpoint,) = monitor["spec"][field]
        wanted = monitor["spec"]["selector"]["matchLabels"].items() - KSERVE_LABELS
        for runtime in runtimes:
            (port,) = runtime["spec"]["containers"][0]["ports"]
            assert endpoint["targetPort"] == port["containerPort"]
            assert wanted <= runtime["spec"]["labels"].items()
        for service in services:
            assert wanted <= service["metadata"]["labels"].items()


KSERVE_LABELS = {("component", "predictor")}
"""What KServe sets by itself."""


@pytest.mark.parametrize("kind", ["NetworkPolicy", "PodDisruptionBudget"])
def test_policies_are_for_the_server_s_pods(kind):
    found = documents(kind)
    assert found
    for _, policy in found:
        selector = policy["spec"].get("podSelector") or policy["spec"]["selector"]
        wanted = selector["matchLabels"].items() - KSERVE_LABELS
        assert wanted <= rendered("runtimes")[0]["spec"]["labels"].items()
