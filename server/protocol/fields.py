"""Types of single fields: how they are read, and what the OpenAPI page says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from engine.types import InvalidRequest
from server.protocol import strict_json
from server.protocol.base import integral

INT64 = 2**63
MAX_WORDS = 1024
"""The most `bad_words` of one request."""
MAX_WORD_LENGTH = 1024
"""The most characters of one of them."""


class Only:
    """Of a field that changes nothing here: these values are accepted, others refused with the reason."""

    def __init__(self, *values: bool | int | float | str, why: str) -> None:
        self._values, self._why = values, why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"const": self._values[0]} if len(self._values) == 1 else {"enum": list(self._values)}

    def _check(self, value: Any, info: core_schema.ValidationInfo[Any]) -> Any:
        for each in self._values:
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return each
        shown = " or ".join(json.dumps(each) for each in self._values)
        message = f"'{info.field_name}' is not supported: {self._why}; only {shown} is accepted"
        raise InvalidRequest(message, code="unsupported_field")


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("'stop' must be a string or a list of strings")
    if len(stops) > 4:
        raise InvalidRequest(f"'stop' has {len(stops)} strings; at most 4 are allowed")
    if "" in stops:
        raise InvalidRequest("'stop' must not hold an empty string")
    return stops


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise InvalidRequest("'logit_bias' must be an object of token ids and numbers")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and str(int(key[:20])) == key):
            raise InvalidRequest(f"'logit_bias': {key!r} is not a token id", code="invalid_token_id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest(f"'logit_bias': the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _schema_text(value: Any) -> str:
    """A JSON schema, as an object or as its text, as text."""
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except ValueError as error:
            raise InvalidRequest(f"not JSON: {error}", code="invalid_grammar") from error
    if not isinstance(value, dict | bool):
        raise InvalidRequest("a JSON schema is an object", code="invalid_grammar")
    return json.dumps(value, ensure_ascii=False)


def _tag_text(value: Any) -> str:
    """A structural tag, as an object or as its text, as text."""
    text = _schema_text(value)
    if not text.startswith("{"):
        raise InvalidRequest("a structural tag is an object", code="invalid_grammar")
    return text


_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    ]
}
_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,18})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_JSON_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string", "minLength": 2}]}
_TAG_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string", "minLength": 2}]}

_TokenId = Annotated[int, Field(ge=0, lt=INT64), BeforeValidator(integral)]
TokenIds = Annotated[list[_TokenId], Field(fail_fast=True)]  # of millions that are wrong, one is told
Stops = Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP_SCHEMA)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_bias), WithJsonSchema(_BIAS_SCHEMA)]
SchemaText = Annotated[str, BeforeValidator(_schema_text), WithJsonSchema(_JSON_SCHEMA)]
TagText = Annotated[str, BeforeValidator(_tag_text), WithJsonSchema(_TAG_SCHEMA)]
Words = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_WORD_LENGTH)]], Field(fail_fast=True)
]


_MOST_CHARACTERS = 16384  # of all bad words: they are encoded between two tokens of other requests


def word_tokens(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of `bad_words`: each word as it begins a text and as it follows a space.

    `encode` adds no special tokens. Raises InvalidRequest for a word that has no tokens.
    """
    if (size := sum(map(len, words))) > _MOST_CHARACTERS:
        message = f"'bad_words' have {size} characters; at most {_MOST_CHARACTERS} are taken"
        raise InvalidRequest(message, "bad_words")
    found: dict[tuple[int, ...], None] = {}  # in order, without duplicates
    for index, word in enumerate(words):
        bare = word.lstrip(" ") or word
        forms = [tuple(encode(form)) for form in (bare, f" {bare}")]
        if not forms[0]:
            raise InvalidRequest(f"'bad_words': {word!r} has no tokens", f"bad_words[{index}]")
        found.update(dict.fromkeys(forms))
    return tuple(found)
