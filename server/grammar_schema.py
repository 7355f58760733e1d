"""JSON Schema as it is compiled: what cannot be held to is refused by name, with the place in the schema.

xgrammar ignores what it does not know, and some of what it knows where keywords meet. `normalized`
therefore lets through only what it does hold to, rewritten to what it takes literally. Objects that
declare properties are closed unless the schema opens them: each answer is one that the schema allows,
not each text that it allows can be an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from server.grammar_disjoint import Disjoint, type_of
from server.grammar_regex import Refused
from server.grammar_values import check_counts, check_pattern, check_string, check_text, numbers, values

_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "contentMediaType",
        "contentEncoding",
        "discriminator",
        "$defs",
        "definitions",
    ]
)
_HEADS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each is taken alone
_OF_TYPE = {
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "uniqueItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "unevaluatedProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
        ]
    ),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_OF_TYPE["integer"] = _OF_TYPE["number"]
_KNOWN = frozenset(_HEADS) | {"type"} | frozenset[str]().union(*_OF_TYPE.values())
# xgrammar takes schemas that differ by these alone for one, property names included.
_CONFUSED = frozenset(
    [
        "title",
        "default",
        "description",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
    ]
)
_DEEPEST = 64


def normalized(schema: Any) -> Any:
    """The schema to compile. Raises Refused."""
    return _Normalizer(schema).whole()


class _Normalizer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._definitions: dict[str, Any] = {}  # by the name it has in the result
        self._names: dict[str, str] = {}  # of what `$ref` names
        self._marks = 0
        self._disjoint = Disjoint(lambda ref: self._target(ref, "$"))

    def whole(self) -> Any:
        found = self._schema(self._root, "$", 0)
        if self._definitions:
            found = {**found, "$defs": self._definitions}
        return found

    def _schema(self, node: Any, path: str, depth: int) -> dict[str, Any]:
        if depth > _DEEPEST:
            raise Refused(path, f"schemas nested more than {_DEEPEST} deep are not supported")
        if node is True:
            return {}
        if node is False:
            raise Refused(path, "the schema false allows nothing")
        if not isinstance(node, dict):
            raise Refused(path, f"a schema must be an object or a boolean, not {type_of(node)}")
        node = self._known(node, path)
        heads = [name for name in _HEADS if name in node]
        if not heads:
            return self._typed(node, path, depth)
        head = heads[0]
        beside = [name for name in node if name != head and (name != "type" or head not in ("const", "enum"))]
        if beside:
            raise Refused(path, f"{head!r} together with {beside[0]!r} is not supported")
        return self._head(head, node, f"{path}.{head}", depth)

    def _known(self, node: Mapping[str, Any], path: str) -> dict[str, Any]:
        kept = {}
        for name, value in node.items():
            if name in _ANNOTATIONS or name.startswith("x-") or (name == "$id" and path == "$"):
                continue
            if name not in _KNOWN:
                raise Refused(path, f"the keyword {name!r} is not supported")
            kept[name] = value
        return kept

    def _head(self, head: str, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        value = node[head]
        if head == "$ref":
            return self._reference(value, path, depth)
        if head in ("const", "enum"):
            return values([value] if head == "const" else value, node.get("type"), path)
        if not isinstance(value, list) or not value:
            raise Refused(path, "must be a list of at least one schema")
        if head == "allOf" and len(value) > 1:
            raise Refused(path, "'allOf' of more than one schema is not supported")
        options = [self._schema(each, f"{path}[{i}]", depth + 1) for i, each in enumerate(value)]
        if head == "oneOf" and (pair := self._disjoint.overlap(value)) is not None:
            first, second = pair
            raise Refused(
                path,
                f"alternatives {first} and {second} may both match, which a grammar cannot rule out: "
                "use anyOf, or tell them apart by type or by a required property with const",
            )
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _reference(self, ref: Any, path: str, depth: int) -> dict[str, Any]:
        if ref == "#":
            return {"$ref": "#"}
        target = self._target(ref, path)
        if ref not in self._names:
            name = self._names[ref] = f"d{len(self._names)}"
            self._check_cycle(ref, path)
            self._definitions[name] = self._schema(target, f"${ref[1:].replace('/', '.')}", depth + 1)
        return {"$ref": f"#/$defs/{self._names[ref]}"}

    def _target(self, ref: Any, path: str) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise Refused(path, f"{ref!r}: only references into the schema itself ('#/...') are supported")
        found = self._root
        for part in unquote(ref[2:]).split("/") if ref != "#" else []:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise Refused(path, f"{ref!r} points nowhere: there is no {key!r}")
        return found

    def _check_cycle(self, ref: str, path: str) -> None:
        seen = [ref]
        target = self._target(ref, path)
        while isinstance(target, dict) and "$ref" in target:
            if target["$ref"] in seen:
                raise Refused(path, f"{ref!r} refers to nothing but itself")
            seen.append(target["$ref"])
            target = self._target(target["$ref"], path)

    # ---- by type

    def _typed(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        names = node.get("type")
        if names is None:
            names = self._inferred(node, path)
            if names is None:
                return {}
        many = names if isinstance(names, list) else [names]
        if not many or any(not isinstance(each, str) or each not in _OF_TYPE for each in many):
            raise Refused(f"{path}.type", f"must be one or more of {', '.join(sorted(_OF_TYPE))}")
        found = [self._of_type(name, node, path, depth) for name in dict.fromkeys(many)]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _inferred(self, node: dict[str, Any], path: str) -> str | None:
        families = {kind for kind, names in _OF_TYPE.items() if kind != "integer" and names & node.keys()}
        if len(families) > 1:
            raise Refused(path, f"needs a 'type': it has keywords of {' and of '.join(sorted(families))}")
        return families.pop() if families else None

    def _of_type(self, name: str, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        own = {key: value for key, value in node.items() if key in _OF_TYPE[name]}
        match name:
            case "string":
                check_string(own, path)
            case "number" | "integer":
                own = numbers(name, own, path)
            case "array":
                own = self._array(own, path, depth)
            case "object":
                own = self._object(own, path, depth)
        return {"type": name, **own}

    def _array(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        if node.pop("uniqueItems", False) is not False:
            raise Refused(path, "the keyword 'uniqueItems' is not supported")
        rest = node.pop("unevaluatedItems", None)
        if "items" not in node and rest is not None:
            node["items"] = rest
        if "prefixItems" in node:
            parts = node["prefixItems"]
            if not isinstance(parts, list) or not parts:
                raise Refused(f"{path}.prefixItems", "must be a list of at least one schema")
            node["prefixItems"] = [
                self._schema(each, f"{path}.prefixItems[{i}]", depth + 1) for i, each in enumerate(parts)
            ]
        if isinstance(node.get("items"), list):
            raise Refused(f"{path}.items", "must be a schema; one for each place is 'prefixItems'")
        if node.get("items", True) is not False and ("items" in node or "prefixItems" not in node):
            node["items"] = self._schema(node.get("items", True), f"{path}.items", depth + 1)
        check_counts(node, ("minItems", "maxItems"), path)
        return node

    def _object(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        rest = node.pop("unevaluatedProperties", None)
        more = node.pop("additionalProperties", rest)
        found = self._declared(node, path, depth)
        names = self._named(node, path, depth)
        if len(names) + bool(found) > 1:
            raise Refused(
                path, "'properties', 'patternProperties' and 'propertyNames' exclude each other here"
            )
        if "patternProperties" in names and more not in (None, False):
            raise Refused(path, "'patternProperties' with other properties allowed is not supported")
        found |= names
        if more is None and "properties" not in found and "patternProperties" not in found:
            more = "properties" not in node  # declared, if none: closed as any others are
        if more is not None:
            found["additionalProperties"] = (
                False if more is False else self._schema(more, f"{path}.additionalProperties", depth + 1)
            )
        check_counts(node, ("minProperties", "maxProperties"), path)
        free = found.get("additionalProperties", False) is not False or "patternProperties" in found
        if free and node.get("minProperties", 0) > 1:
            raise Refused(path, "'minProperties' over 1 is supported for declared properties only")
        return found | {name: node[name] for name in ("minProperties", "maxProperties") if name in node}

    def _declared(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        properties, required = node.get("properties", {}), node.get("required", [])
        if not isinstance(properties, dict):
            raise Refused(f"{path}.properties", f"must be an object, not {type_of(properties)}")
        if not isinstance(required, list) or any(not isinstance(name, str) for name in required):
            raise Refused(f"{path}.required", "must be a list of strings")
        if missing := [name for name in required if name not in properties]:
            raise Refused(f"{path}.required", f"{missing[0]!r} is not in 'properties'")
        for name in properties:
            check_text(name, f"{path}.properties")
        if not properties:
            return {}
        found: dict[str, Any] = {
            "properties": {
                name: self._schema(each, f"{path}.properties.{name}", depth + 1)
                for name, each in properties.items()
            },
            "required": list(dict.fromkeys(required)),
        }
        if _CONFUSED & properties.keys():
            self._marks += 1
            found["x-mark"] = self._marks
        return found

    def _named(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """`patternProperties` or `propertyNames`."""
        found: dict[str, Any] = {}
        if node.get("patternProperties"):
            patterns = node["patternProperties"]
            if not isinstance(patterns, dict) or len(patterns) > 1:
                raise Refused(f"{path}.patternProperties", "more than one pattern is not supported")
            for pattern, each in patterns.items():
                where = f"{path}.patternProperties.{pattern}"
                check_pattern(pattern, where)
                found["patternProperties"] = {pattern: self._schema(each, where, depth + 1)}
        if "propertyNames" in node and node["propertyNames"] is not True:
            names = node["propertyNames"]
            where = f"{path}.propertyNames"
            if not isinstance(names, dict) or names.get("type", "string") != "string":
                raise Refused(where, "must be a schema of strings")
            found["propertyNames"] = self._schema({"type": "string", **names}, where, depth + 1)
        return found
