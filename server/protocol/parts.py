"""Content in parts: objects of a `type`, each with a piece of the text. Read alike by chat and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationInfo

from engine.types import InvalidRequest

TEXT_ONLY = "only text goes in and out"


@dataclass(frozen=True)
class Part:
    """A type of part. `text`: the field that has its text; `also`: fields of an earlier answer, which
    change nothing."""

    type: str
    text: str = "text"
    also: tuple[str, ...] = ()


REFUSAL = Part("refusal", "refusal")
"""Text as well: it is what the assistant said."""


def text_of(*kinds: Part) -> Callable[[Any, ValidationInfo], str]:
    """A validator: a string as it is, parts of these kinds joined without anything between them."""

    def read(value: Any, info: ValidationInfo) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"'{info.field_name}' must be a string or a list of text parts")
        return _joined(value, kinds)

    return read


def text_of_parts(kind: Part) -> Callable[[Any, ValidationInfo], str]:
    """A validator: parts of this kind, which may be none, joined without anything between them."""

    def read(value: Any, info: ValidationInfo) -> str:
        if not isinstance(value, list):
            raise InvalidRequest(f"'{info.field_name}' must be a list of parts of type '{kind.type}'")
        return _joined(value, (kind,))

    return read


def _joined(parts: list[Any], kinds: Sequence[Part]) -> str:
    return "".join(_text(part, f"[{index}]", kinds) for index, part in enumerate(parts))


def _text(part: Any, at: str, kinds: Sequence[Part]) -> str:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest("a content part must be an object with a 'type'", at)
    kind = next((kind for kind in kinds if kind.type == name), None)
    if kind is None:
        known = ", ".join(kind.type for kind in kinds)
        message = f"content parts of type '{name[:64]}' are not supported here: {TEXT_ONLY} ({known})"
        raise InvalidRequest(message, f"{at}.type", "unsupported_content")
    for field in part:
        if field not in ("type", kind.text, *kind.also):
            message = f"a part of type '{name}' has no field '{field[:64]}'"
            raise InvalidRequest(message, f"{at}.{field[:64]}", "unknown_field")
    if not isinstance(part.get(kind.text), str):
        raise InvalidRequest(f"a part of type '{name}' needs the string '{kind.text}'", f"{at}.{kind.text}")
    return str(part[kind.text])


def text_schema(*kinds: Part) -> dict[str, Any]:
    """What `text_of` takes, for the OpenAPI page."""
    items = [_schema(kind) for kind in kinds]
    one = items[0] if len(items) == 1 else {"anyOf": items}
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": one}]}


def parts_schema(kind: Part) -> dict[str, Any]:
    """What `text_of_parts` takes, for the OpenAPI page."""
    return {"type": "array", "items": _schema(kind)}


def _schema(kind: Part) -> dict[str, Any]:
    own = {"type": {"const": kind.type}, kind.text: {"type": "string"}}
    return {
        "type": "object",
        "properties": own | {name: {} for name in kind.also},
        "required": ["type", kind.text],
        "additionalProperties": False,
    }
