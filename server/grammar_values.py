"""Values, strings, counts and numbers of a JSON schema: what can be compiled of them."""

from __future__ import annotations

import math
from typing import Any

from server.grammar_disjoint import type_of
from server.grammar_regex import Refused, check_regex

_FORMATS = frozenset(
    [
        "date-time",
        "date",
        "time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
        "uri-reference",
        "json-pointer",
    ]
)
_MOST_REPEATS = 100_000
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"  # xgrammar's own lets zeros lead
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"


def values(values: Any, types: Any, path: str) -> dict[str, Any]:
    """An enum of those values that have one of the types."""
    if not isinstance(values, list) or not values:
        raise Refused(path, "must be a list of at least one value")
    for value in values:
        _check_value(value, path)
    if types is not None:
        allowed = types if isinstance(types, list) else [types]
        values = [each for each in values if type_of(each) in allowed or _is_number(each, allowed)]
        if not values:
            raise Refused(path, f"no value has the type {types!r}")
    return {"enum": values}


def _is_number(value: Any, allowed: list[Any]) -> bool:
    return type_of(value) == "integer" and "number" in allowed


def _check_value(value: Any, path: str) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            check_text(item, path)
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise Refused(path, f"{str(item)[:40]} has more than 64 bits")
        elif isinstance(item, float) and not math.isfinite(item):
            raise Refused(path, f"{item} is not a finite number")
        elif isinstance(item, list):
            left.extend(item)
        elif isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())


def check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(path, f"{text!r} is not valid Unicode") from error


def check_string(node: dict[str, Any], path: str) -> None:
    check_counts(node, ("minLength", "maxLength"), path)
    if len({name.replace("min", "max") for name in node}) > 1:
        names = " and ".join(repr(name) for name in node)
        raise Refused(path, f"{names} together are not supported")
    if "pattern" in node:
        check_pattern(node["pattern"], f"{path}.pattern")
    if "format" in node and not (isinstance(node["format"], str) and node["format"] in _FORMATS):
        known = ", ".join(sorted(_FORMATS))
        raise Refused(f"{path}.format", f"{node['format']!r} is not supported; supported: {known}")
    if node.get("format") == "ipv4":
        del node["format"]
        node["pattern"] = _IPV4


def check_pattern(pattern: Any, path: str) -> None:
    if not isinstance(pattern, str):
        raise Refused(path, f"must be a string, not {type_of(pattern)}")
    try:
        check_regex(pattern, in_json=True)
    except Refused as error:
        raise Refused(path, str(error)) from error


def check_counts(node: dict[str, Any], names: tuple[str, str], path: str) -> None:
    for name in names:
        value = node.get(name, 0)
        if isinstance(value, float) and value.is_integer():
            value = node[name] = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_REPEATS:
            raise Refused(f"{path}.{name}", f"must be an integer from 0 to {_MOST_REPEATS}")
    least, most = names
    if node.get(least, 0) > node.get(most, _MOST_REPEATS):
        raise Refused(path, f"{least!r} is more than {most!r}")


def numbers(kind: str, node: dict[str, Any], path: str) -> dict[str, Any]:
    for name, value in node.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**53:
            raise Refused(f"{path}.{name}", "must be a number between -2^53 and 2^53")
    if kind == "number":
        if "multipleOf" in node:
            raise Refused(path, "'multipleOf' is supported for the type integer only")
        _check_range(node, path)
        return node
    return _integers(node, path)


def _check_range(node: dict[str, Any], path: str) -> None:
    low = max(node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf))
    high = min(node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf))
    open_end = low == node.get("exclusiveMinimum") or high == node.get("exclusiveMaximum")
    if low > high or (low == high and open_end):
        raise Refused(path, "no number lies between the bounds")


def _integers(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Inclusive bounds alone, as integers; `multipleOf` where xgrammar does not drop it."""
    low = [math.ceil(node["minimum"])] if "minimum" in node else []
    low += [math.floor(node["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in node else []
    high = [math.floor(node["maximum"])] if "maximum" in node else []
    high += [math.ceil(node["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in node else []
    found: dict[str, Any] = ({"minimum": max(low)} if low else {}) | ({"maximum": min(high)} if high else {})
    if low and high and found["minimum"] > found["maximum"]:
        raise Refused(path, "no integer lies between the bounds")
    if "multipleOf" in node:
        step = node["multipleOf"]
        bounded = bool(low) and bool(high) and found["maximum"] - found["minimum"] < 10_000
        if step != int(step) or not 1 <= step <= 1024 or not (bounded or not (low or high)):
            raise Refused(
                f"{path}.multipleOf",
                "is supported for integers from 1 to 1024, without bounds or within 10000 of each other",
            )
        found["multipleOf"] = int(step)
    return found
