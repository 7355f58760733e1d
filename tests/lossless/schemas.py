"""Random JSON schemas: nested, enums, arrays, patterns, bounds, references, unicode."""

from __future__ import annotations

import random
from typing import Any

_NAMES = (
    "name",
    "age",
    "title",
    "größe",
    "名前",
    "city",
    "value",
    "id",
    "tags",
    "größe 2",
    'a "b"',
    "naïve",
    "é🙂",
)
_WORDS = ("red", "green", "café", "日本", "smörgås", "🙂 ok", "a/b", 'say "hi"', "tab\there", "x", "")
_PATTERNS = (
    "^[A-Z]{2}-[0-9]{3}$",
    "^(foo|bar)+$",
    "^[a-zäöü]{3,8}$",
    "^#[0-9a-f]{6}$",
    "[0-9]+ (apples|pears)",
    "^[^0-9]{1,10}$",
    "^\\d{1,3}(\\.\\d{1,3}){3}$",
    "^[あ-ん]{2,5}$",
    "^\\S{1,12}$",
)
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration", "ipv6")


def schema(source: random.Random) -> dict[str, Any]:
    """One schema, an object at the top more often than not."""
    definitions: dict[str, Any] = {}
    make = _Maker(source, definitions)
    found = make.object(3) if source.random() < 0.8 else make.any(3)
    return {**found, "$defs": definitions} if definitions else found


class _Maker:
    def __init__(self, source: random.Random, definitions: dict[str, Any]) -> None:
        self._source, self._definitions = source, definitions

    def any(self, depth: int) -> dict[str, Any]:
        flat = [self.string, self.integer, self.number, self.constant, self.plain]
        deep = [self.object, self.array, self.either, self.map, self.reference, self.tuple]
        kind = self._source.choice(flat if depth == 0 or self._source.random() < 0.6 else deep)
        found = kind(depth)
        if self._source.random() < 0.15:
            found = {**found, "description": "one of many", "x-order": 1}
        return found

    def object(self, depth: int) -> dict[str, Any]:
        names = self._source.sample(_NAMES, self._source.randint(1, 4))
        required = [name for name in names if self._source.random() < 0.7]
        found: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.any(max(depth - 1, 0)) for name in names},
            "required": required,
        }
        if self._source.random() < 0.6:
            found["additionalProperties"] = False
        if self._source.random() < 0.2:
            found["maxProperties"] = self._source.randint(len(required), len(names))
        elif self._source.random() < 0.2:
            found["minProperties"] = self._source.randint(0, len(names))
            found["additionalProperties"] = False
        return found

    def map(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "object", "maxProperties": self._source.randint(1, 3)}
        roll = self._source.random()
        if roll < 0.4:
            found["additionalProperties"] = self.any(max(depth - 2, 0))
        elif roll < 0.7:
            found["patternProperties"] = {"^k[0-9]{1,2}$": self.any(0)}
            found["additionalProperties"] = False
        else:
            found["propertyNames"] = {"maxLength": 6, "minLength": 1}
            found["additionalProperties"] = self.any(0)
        return found

    def array(self, depth: int) -> dict[str, Any]:
        least = self._source.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(max(depth - 2, 0)),
            "minItems": least,
            "maxItems": least + self._source.randint(0, 3),
        }

    def tuple(self, depth: int) -> dict[str, Any]:
        parts = [self.any(0) for _ in range(self._source.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def either(self, depth: int) -> dict[str, Any]:
        if self._source.random() < 0.5:
            return {"anyOf": [self.any(max(depth - 1, 0)), {"type": "null"}]}
        kinds = [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": self.any(0)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind in ("one", "zwei")
        ]
        return {"oneOf": kinds}

    def reference(self, depth: int) -> dict[str, Any]:
        name = f"node{len(self._definitions)}"
        self._definitions[name] = {}  # taken: what it holds may make more
        self._definitions[name] = {
            "type": "object",
            "properties": {
                "label": self.any(0),
                "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]},
            },
            "required": ["label", "next"],
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}

    def string(self, depth: int) -> dict[str, Any]:
        roll = self._source.random()
        if roll < 0.35:
            return {"type": "string", "pattern": self._source.choice(_PATTERNS)}
        if roll < 0.55:
            return {"type": "string", "format": self._source.choice(_FORMATS)}
        least = self._source.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + self._source.randint(1, 12)}

    def integer(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "integer"}
        low = self._source.randint(-1000, 1000)
        if self._source.random() < 0.6:
            found[self._source.choice(["minimum", "exclusiveMinimum"])] = low
        if self._source.random() < 0.6:
            found[self._source.choice(["maximum", "exclusiveMaximum"])] = low + self._source.randint(2, 5000)
        if len(found) in (1, 3) and self._source.random() < 0.3:
            found["multipleOf"] = self._source.choice([1, 2])
        return found

    def number(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "number"}
        low = round(self._source.uniform(-100, 100), self._source.randint(0, 3))
        if self._source.random() < 0.5:
            found[self._source.choice(["minimum", "exclusiveMinimum"])] = low
        if self._source.random() < 0.5:
            found[self._source.choice(["maximum", "exclusiveMaximum"])] = low + self._source.randint(1, 50)
        return found

    def constant(self, depth: int) -> dict[str, Any]:
        values: list[Any] = [*self._source.sample(_WORDS, 3), self._source.randint(-9, 9), None, True, 2.5]
        if self._source.random() < 0.3:
            return {"const": self._source.choice([*values, [1, "zwei"], {"a": None}])}
        if self._source.random() < 0.5:
            return {"type": "string", "enum": self._source.sample(_WORDS, 4)}
        return {"enum": self._source.sample(values, 4)}

    def plain(self, depth: int) -> dict[str, Any]:
        return {"type": self._source.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}
