"""JSON as RFC 8259 has it: no NaN, no overflow, no lone surrogates, no name twice in one object."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any

from server.bounds import MOST_OBJECTS

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

DEEPEST = 200
"""Levels of nesting. pydantic writes no value out again that has more than 255."""


class TooMany(ValueError):
    """More objects and arrays than may be, or names in one of them."""


def loads(text: str, objects: int = MOST_OBJECTS) -> Any:
    """Raises ValueError, whose message says what is wrong, in words for a client; TooMany if there are more
    than so many `objects` and arrays, or names in one object."""
    _check_structure(text, objects)
    try:
        data = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=partial(_no_duplicates, most=objects),
        )
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a string holds a lone surrogate, which is not a character") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):
            raise ValueError("a number has too many digits") from error
        raise
    return data


def _check_structure(text: str, objects: int) -> None:
    """Before anything is built of it."""
    if text.count("[") + text.count("{") <= min(DEEPEST, objects):
        return
    depth = 0
    for match in _STRUCTURE.finditer(text):
        step = _STEPS.get(match[0], 0)
        depth += step
        objects -= step > 0
        if depth > DEEPEST:
            raise ValueError(f"it is nested too deeply: at most {DEEPEST} levels are taken")
        if objects < 0:
            raise TooMany("it holds too many objects and arrays")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {literal[:32]} is out of range")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], most: int) -> dict[str, Any]:
    if len(pairs) > most:
        raise TooMany("an object has too many names")
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:64]!r} comes twice in one object")
            seen.add(name)
    return data
