"""Every query of deploy/: of dashboards' panels and variables, of recording rules and alerts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
PROMETHEUS = DEPLOY / "prometheus"
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMPARISON = re.compile(r"(?:==|!=|>=|<=|>|<)")
_WORDS = frozenset(("and", "or", "unless", "bool", "offset"))  # labels go with those before them
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")


@dataclass(frozen=True)
class Query:
    """`where`: dashboard/number and title of the panel/letter, or the rule's name.

    `kind`: panel, record or alert.
    """

    kind: str
    where: str
    expr: str


def dashboards() -> dict[str, dict[str, Any]]:
    """The dashboards by file name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that show something, in rows or out of them."""
    for panel in dashboard["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def panel_queries() -> list[Query]:
    """Of all dashboards; the variables of Grafana stand in them."""
    return [
        Query("panel", f"{name}/{panel['id']} {panel['title']}/{target['refId']}", target["expr"])
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def variables() -> dict[str, str]:
    """What the choices of values ask, by name: label_values(metric, label)."""
    return {
        each["name"]: each["query"]["query"]
        for dashboard in dashboards().values()
        for each in dashboard["templating"]["list"]
        if each["type"] == "query"
    }


def rules() -> list[dict[str, Any]]:
    """All rules, of all files."""
    return [
        rule
        for file in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def rule_queries() -> list[Query]:
    """Of recording rules their names, so that it is seen what was recorded; of alerts `measured`."""
    return [
        Query("record", _recorded(rule), _recorded(rule))
        if "record" in rule
        else Query("alert", rule["alert"], measured(rule["expr"]))
        for rule in rules()
    ]


def _recorded(rule: Mapping[str, Any]) -> str:
    labels = ", ".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
    return f"{rule['record']}{{{labels}}}" if labels else str(rule["record"])


def measured(alert: str) -> str:
    """An alert's condition, asked so that it gives a number if and only if each of its parts gives one.

    Comparisons are differences instead, `and` and `or` are sums, and of what an alert wants absent the
    presence is asked.
    """
    if re.search(r"\b(unless|bool|absent_over_time)\b", alert):
        raise ValueError(f"no such sum can be made of: {alert}")

    def change(part: str) -> str:
        part = re.sub(r"\b(and|or)\b", "+", _COMPARISON.sub("-", part))
        return re.sub(r"\babsent\s*\(", "(", part)

    return _outside_text(alert, change)


def _outside_text(expr: str, change: Callable[[str], str]) -> str:
    """Changes what is neither in quotation marks nor in braces."""
    kept = re.compile(r'\{(?:"(?:[^"\\]|\\.)*"|[^}"])*\}|"(?:[^"\\]|\\.)*"')
    parts, end = [], 0
    for found in kept.finditer(expr):
        parts += [change(expr[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(expr[end:])])


def metric_names(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", _TEXT.sub("", expr))
    bare = _LABELS.sub(" ", bare)
    names = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return {name for name in names if name not in _WORDS and name.lower() not in ("inf", "nan")}


def filled(expr: str, values: Mapping[str, str]) -> str:
    """With Grafana's variables replaced, as $instance. Raises ValueError if one is left."""
    for name, value in values.items():
        expr = expr.replace(f"${name}", value)
    if "$" in expr:
        raise ValueError(f"a variable without a value: {expr}")
    return expr
