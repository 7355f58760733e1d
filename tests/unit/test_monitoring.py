"""What deploy/ asks for exists: dashboards, rules and alerts against our own registry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from server.metrics import Metrics
from server.metrics_labels import constant_labels

sys.path.insert(0, str(Path(__file__).parents[1] / "suites"))
sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "grafana"))

import dashboards as described
from monitoring_queries import (
    PROMETHEUS,
    Query,
    dashboards,
    filled,
    measured,
    metric_names,
    panel_queries,
    panels,
    rules,
    variables,
)

OF_PROMETHEUS = {"up", "scrape_duration_seconds"}
LABELS_OF_PROMETHEUS = {"job", "instance"}
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}
RULES = {rule.get("record") or rule["alert"]: rule for rule in rules()}
ALERTS = [name for name, rule in RULES.items() if "alert" in rule]
QUERIES = [*panel_queries(), *(Query("rule", name, rule["expr"]) for name, rule in RULES.items())]
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def our_metrics() -> set[str]:
    metrics = Metrics()
    engine: Any = SimpleNamespace(on_step=lambda listener: None, state="loading", restarts=0)
    engine.info = SimpleNamespace(target="t", draft=None, dtype="float32", device="cpu")
    metrics.watch(engine, "0")
    return {
        family.name + suffix
        for family in metrics.registry.collect()
        for suffix in SUFFIXES.get(family.type, ())
    }


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_every_metric_exists(query: Query) -> None:
    recorded = {name for name, rule in RULES.items() if "record" in rule}
    names = metric_names(query.expr)

    assert names - our_metrics() - recorded - OF_PROMETHEUS == set()
    assert names or query.expr.startswith("vector(")


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_every_label_is_one_of_ours(query: Query) -> None:
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query.expr))
    for listed in re.findall(r"\bby\s*\(([^)]*)\)", query.expr):
        used |= {name.strip() for name in listed.split(",")}

    for name in used - LABELS_OF_PROMETHEUS:
        with pytest.raises(ValueError, match="one of our metrics' own"):
            constant_labels([f"{name}=value"])


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        (
            'sum by (le) (rate(a_bucket{le="+Inf", by=~"b|c"}[5m])) / on (x) group_left (y) d',
            {"a_bucket", "d"},
        ),
        ("a:b:rate5m > 2e3 * scalar(c) and vector(1 - 0.995)", {"a:b:rate5m", "c"}),
        ('a{text="} b"} or 0 * c offset 5m', {"a", "c"}),
    ],
)
def test_metrics_are_found(expr: str, names: set[str]) -> None:
    assert metric_names(expr) == names


@pytest.mark.parametrize(
    ("alert", "asked"),
    [
        ("a > 2", "a - 2"),
        ('a{b!="x or y", c=~"<"} == 0', 'a{b!="x or y", c=~"<"} - 0'),
        ("(a >= 1 and b < c) or d != 0", "(a - 1 + b - c) + d - 0"),
        ('absent(a{b="absent("})', '(a{b="absent("})'),
    ],
)
def test_an_alert_is_asked_for_its_numbers(alert: str, asked: str) -> None:
    assert measured(alert) == asked


def test_an_alert_that_cannot_be_asked_so_is_refused() -> None:
    with pytest.raises(ValueError, match="a unless b"):
        measured("a unless b")


def test_variables_are_filled_and_none_is_left() -> None:
    assert filled('a{b=~"$b"}[$__range]', {"b": "x|y", "__range": "5s"}) == 'a{b=~"x|y"}[5s]'
    with pytest.raises(ValueError, match=r"\$c"):
        filled("a{b=$c}", {"b": "x"})


def test_dashboards_are_as_described() -> None:
    files = described.files()

    assert set(files) == set(described.FOLDER.glob("*.json"))
    for file, text in files.items():
        assert file.read_text() == text, "run `python deploy/grafana/dashboards.py`"


@pytest.mark.parametrize("name", dashboards())
def test_a_dashboard_is_whole(name: str) -> None:
    page = dashboards()[name]
    shown = list(panels(page))

    assert page["uid"] == f"disco-{name}"
    assert len({each["id"] for each in page["panels"]}) == len(page["panels"])
    assert not re.search("https?://", json.dumps(page)), "outer resources"
    known = {each["name"] for each in page["templating"]["list"]} | {"__rate_interval", "__range"}
    for panel in shown:
        assert panel["title"] and panel["description"] and panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= known


@pytest.mark.parametrize("name", dashboards())
def test_panels_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboards()[name]["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_choices_are_of_metrics_that_exist() -> None:
    for asked in variables().values():
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
        assert metric in our_metrics()
        assert label in {"instance", "policy"}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_tells_what_to_do(name: str) -> None:
    alert = RULES[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"] and alert["annotations"]["description"]
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    assert re.search(rf"^### {name}$", OPERATIONS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tried_both_ways(name: str) -> None:
    expected = [
        case["exp_alerts"]
        for file in (PROMETHEUS / "tests").glob("*.yml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert any(expected)
    assert not all(expected)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", "prometheus.yml"),
        *(("test", "rules", f"tests/{file.name}") for file in sorted((PROMETHEUS / "tests").glob("*.yml"))),
    ],
    ids=" ".join,
)
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
