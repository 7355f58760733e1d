"""Grafana's JSON from few words: panels, their queries, and where they lie on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Panel = dict[str, Any]
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA_VERSION = 42  # of dashboard JSON; Grafana 12 and 13 write it
_COLUMNS = 24


def query(expr: str, legend: str = "", **fields: Any) -> dict[str, Any]:
    """A range query; `legend` is Grafana's template over labels. Its refId is given by the panel."""
    return {"datasource": _SOURCE, "editorMode": "code", "expr": expr, "legendFormat": legend, "range": True,
            **fields}  # fmt: skip


def instant(expr: str, legend: str = "", **fields: Any) -> dict[str, Any]:
    """One value a series, at the end of the time shown."""
    return query(expr, legend, range=False, instant=True, **fields)


def _panel(
    kind: str,
    title: str,
    text: str,
    queries: Iterable[dict[str, Any]],
    defaults: dict[str, Any],
    size: tuple[int, int],
    **more: Any,
) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": _SOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [{**each, "refId": chr(ord("A") + i)} for i, each in enumerate(queries)],
        **more,
    }


def lines(
    title: str,
    text: str,
    *queries: dict[str, Any],
    unit: str = "short",
    stack: str = "none",
    width: int = 8,
    **axis: float,
) -> Panel:
    """Curves over time. `stack`: none, normal, or percent. `axis`: min and max."""
    custom = {
        "lineWidth": 1,
        "fillOpacity": 10 if stack == "none" else 60,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": stack, "group": "A"},
    }
    return _panel(
        "timeseries",
        title,
        text,
        queries,
        {"unit": unit, "min": 0, "color": {"mode": "palette-classic"}, "custom": custom, **axis},
        (width, 8),
        options={
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    )


def heatmap(title: str, text: str, buckets: str, unit: str, width: int = 8) -> Panel:
    """`buckets` is a query of one series an `le`."""
    return _panel(
        "heatmap",
        title,
        text,
        [query(buckets, "{{le}}", format="heatmap")],
        {"custom": {"scaleDistribution": {"type": "linear"}}},
        (width, 8),
        options={
            "calculate": False,
            "cellGap": 1,
            "cellValues": {},
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5,
                      "fill": "dark-orange", "reverse": False},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
        },
    )  # fmt: skip


def stat(
    title: str, text: str, expr: str, unit: str = "short", width: int = 3, words: dict[str, Any] | None = None
) -> Panel:
    """One number with its curve behind it. `words`: Grafana's mapping of values to text."""
    return _panel(
        "stat",
        title,
        text,
        [query(expr)],
        {"unit": unit, "color": {"mode": "thresholds"}, "mappings": [words] if words else [],
         "thresholds": {"mode": "absolute", "steps": [{"color": "text", "value": None}]}},
        (width, 4),
        options={
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
        },
    )  # fmt: skip


def table(title: str, text: str, columns: dict[str, tuple[str, str]], labels: list[str]) -> Panel:
    """A row for each set of `labels`; `columns` are (query, unit) by heading."""
    queries = [instant(expr, format="table") for expr, _ in columns.values()]
    letters = [f"Value #{chr(ord('A') + i)}" for i in range(len(columns))]
    # the values of a single query have no letter
    names = dict(zip(letters if len(letters) > 1 else ["Value"], columns, strict=True))
    panel = _panel(
        "table",
        title,
        text,
        queries,
        {"custom": {"align": "auto", "cellOptions": {"type": "auto"}}, "decimals": 2},
        (24, 9),
        options={"showHeader": True, "cellHeight": "sm",
                 "sortBy": [{"displayName": labels[0], "desc": False}]},
        transformations=[
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {
                "excludeByName": {"Time": True},
                "indexByName": {name: i for i, name in enumerate([*labels, *names])},
                "renameByName": names,
            }},
        ],
    )  # fmt: skip
    panel["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
        for heading, (_, unit) in columns.items()
    ]
    return panel


def bars(title: str, text: str, expr: str, unit: str, *, along: str, each: str, width: int = 12) -> Panel:
    """Groups of bars along one label, which is a number, with a bar for each value of another one."""
    number = {"targetField": along, "destinationType": "number"}
    return _panel(
        "barchart",
        title,
        text,
        [instant(expr, format="table")],
        {"unit": unit, "min": 0, "color": {"mode": "palette-classic"},
         "custom": {"fillOpacity": 80, "lineWidth": 1}},
        (width, 9),
        options={
            "orientation": "auto", "showValue": "never", "stacking": "none", "groupWidth": 0.7,
            "barWidth": 0.97, "barRadius": 0, "fullHighlight": False,
            "xTickLabelRotation": 0, "xTickLabelSpacing": 0,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        transformations=[
            {"id": "convertFieldType", "options": {"fields": {}, "conversions": [number]}},
            {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": along, "desc": False}]}},
            {"id": "groupingToMatrix", "options": {
                "columnField": each, "rowField": along, "valueField": "Value", "emptyValue": "null"}},
        ],
    )  # fmt: skip


def row(title: str) -> Panel:
    """A heading across the page."""
    return {
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"w": _COLUMNS, "h": 1},
    }


def variable(name: str, label: str, expr: str) -> dict[str, Any]:
    """A choice of several values, or all: `expr` is a query of values, as label_values(metric, label)."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": _SOURCE,
        "query": {"query": expr, "refId": "StandardVariableQuery"},
        "refresh": 2,  # when the time shown changes: what ran yesterday can be chosen for yesterday
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def dashboard(uid: str, title: str, text: str, variables: list[dict[str, Any]], panels: list[Panel]) -> Panel:
    """The whole page, its panels from left to right in the order given."""
    return {
        "uid": uid,
        "title": title,
        "description": text,
        "tags": ["disco-serve"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "title": "disco-serve", "tags": ["disco-serve"], "asDropdown": True,
                   "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link",
                   "tooltip": "", "url": ""}],
        "templating": {"list": [
            {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus",
             "refresh": 1, "regex": "", "options": []},
            *variables,
        ]},
        "panels": _placed(panels),
    }  # fmt: skip


def _placed(panels: list[Panel]) -> list[Panel]:
    """With an id each, and a place: a panel that does not fit into its line begins the next one."""
    x = y = height = 0
    placed = []
    for number, panel in enumerate(panels, 1):
        size = panel["gridPos"]
        if x + size["w"] > _COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append({"id": number, **panel, "gridPos": {"x": x, "y": y, **size}})
        x, height = x + size["w"], max(height, size["h"])
    return placed
