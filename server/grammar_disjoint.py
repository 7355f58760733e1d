"""Whether schemas exclude each other, as far as types and constants tell: what `oneOf` asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def type_of(value: Any) -> str:
    """The name that JSON Schema has for a value's type. Whole numbers are integers, however written."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


class Disjoint:
    """`resolve` gives what a `$ref` names."""

    def __init__(self, resolve: Callable[[Any], Any]) -> None:
        self._resolve = resolve

    def overlap(self, options: list[Any]) -> tuple[int, int] | None:
        """The first two alternatives that are not seen to exclude each other."""
        found = [self._followed(each) for each in options]
        for j, second in enumerate(found):
            for i, first in enumerate(found[:j]):
                if not self._apart(first, second):
                    return i, j
        return None

    def _followed(self, node: Any) -> dict[str, Any]:
        for _ in range(64):
            if not isinstance(node, dict) or "$ref" not in node:
                break
            node = self._resolve(node["$ref"])
        return node if isinstance(node, dict) else {}

    def _apart(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        values = _finite(a), _finite(b)
        if values[0] is not None and values[1] is not None:
            return not values[0] & values[1]
        types = _types(a), _types(b)
        if types[0] is not None and types[1] is not None and not types[0] & types[1]:
            return True
        return self._told_apart(a, b)

    def _told_apart(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        """Two objects with a property that both require, and whose constants differ."""
        if "object" not in (_types(a) or ()) or "object" not in (_types(b) or ()):
            return False
        for name in set(a.get("required", ())) & set(b.get("required", ())):
            first, second = (_finite(self._followed(each.get("properties", {}).get(name))) for each in (a, b))
            if first is not None and second is not None and not first & second:
                return True
        return False


def _finite(node: dict[str, Any]) -> frozenset[str] | None:
    """The only values, as text in one form; None if there may be others."""
    if "const" in node:
        return frozenset([_canonical(node["const"])])
    if isinstance(node.get("enum"), list):
        return frozenset(map(_canonical, node["enum"]))
    return None


def _canonical(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _types(node: dict[str, Any]) -> set[str] | None:
    """The types that values may have, "number" for both kinds of numbers; None if any."""
    if "const" in node or isinstance(node.get("enum"), list):
        names = {type_of(value) for value in node.get("enum", [node.get("const")])}
    elif isinstance(node.get("type"), str):
        names = {node["type"]}
    elif isinstance(node.get("type"), list):
        names = {str(each) for each in node["type"]}
    else:
        return None
    return {"number" if name == "integer" else name for name in names}
