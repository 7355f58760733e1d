"""What every body of the API is: a JSON object whose unknown names are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from engine.types import InvalidRequest

_SAID_OUTSIDE = ("title", "description", "default", "examples")


class Body(BaseModel):
    """A JSON object of the API. Unknown names are refused; null means the field's default.

    `unsupported` maps the name of a known field of others that is refused to the reason.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    unsupported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refused = cls.refused()
        for name in data:
            if name in refused and data[name] is not None:
                message = f"'{name}' is not supported: {refused[name]}"
                raise InvalidRequest(message, name, "unsupported_field")
        fields = cls.model_fields.items()
        optional = {field.alias or name for name, field in fields if not field.is_required()}
        optional |= refused.keys()
        integers = {field.alias or name for name, field in fields if int in arms(field.annotation)}
        return {
            name: integral(value) if name in integers else value
            for name, value in data.items()
            if value is not None or name not in optional
        }

    @classmethod
    def refused(cls) -> dict[str, str]:
        """Names and reasons of the fields that this body and those it is made from refuse."""
        reasons: dict[str, str] = {}
        for kind in reversed(cls.__mro__):
            reasons |= vars(kind).get("unsupported", {})
        return {name: reason for name, reason in reasons.items() if name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The page says it too: a field that may be left out may be null."""
        return optional_shown(core_schema, handler, lambda _, field: nullable(field))


def integral(value: Any) -> Any:
    """JSON has one kind of number, and its schema says so too: 1.0 is the integer 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def arms(annotation: Any) -> tuple[Any, ...]:
    """The types in a union, or the one that there is."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def optional_shown(
    core_schema: CoreSchema,
    handler: GetJsonSchemaHandler,
    shown: Callable[[str, JsonSchemaValue], JsonSchemaValue],
) -> JsonSchemaValue:
    """A model's schema with each field that may be left out as `shown(name, schema)` has it."""
    schema = handler(core_schema)
    own = handler.resolve_ref_schema(schema)
    for name, field in own.get("properties", {}).items():
        if name not in own.get("required", ()):
            own["properties"][name] = shown(name, field)
    return schema


def nullable(field: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a field that may be null as well."""
    bare = without_null(field)
    outside = {key: value for key, value in bare.items() if key in _SAID_OUTSIDE}
    inside = {key: value for key, value in bare.items() if key not in _SAID_OUTSIDE}
    kinds = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {**outside, "anyOf": [*kinds, {"type": "null"}]}


def without_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a field that is never null."""
    kinds = [arm for arm in field.get("anyOf", ()) if arm != {"type": "null"}]
    if len(kinds) != 1:
        return {**field, "anyOf": kinds} if kinds else field
    only: JsonSchemaValue = kinds[0]
    return {key: value for key, value in field.items() if key != "anyOf"} | only
