"""The field `structured_outputs`, as vLLM names it: what an answer must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from engine.types import InvalidRequest
from server.grammar import Structure
from server.protocol.base import Body
from server.protocol.fields import Only, SchemaText, TagText

_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_FREE = "white space in JSON is the model's choice"
_SAY_SO = "say 'additionalProperties': false in the schema"


class StructuredOutputs(Body):
    """Exactly one of `json`, `json_object`, `regex`, `choice`, `grammar` and `structural_tag`."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "whitespace_pattern": "write the white space into a grammar or regex",
    }

    json_schema: SchemaText | None = Field(
        None, alias="json", description="a JSON schema, as an object or as its text"
    )
    json_object: bool = Field(False, description="true: any JSON object")
    regex: str | None = Field(None, min_length=1, description="a regular expression for the whole answer")
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="the answer is one of these strings"
    )
    grammar: str | None = Field(
        None, min_length=1, description="a grammar in EBNF whose first rule is `root`"
    )
    structural_tag: TagText | None = Field(
        None, description="a structural tag as xgrammar has it, as an object or as its text"
    )
    disable_fallback: bool = Field(
        False, description="of vLLM; changes nothing: nothing falls back to another backend"
    )
    disable_any_whitespace: Annotated[bool, Only(False, why=_FREE)] = Field(
        False, description="of vLLM; only false"
    )
    disable_additional_properties: Annotated[bool, Only(False, why=_SAY_SO)] = Field(
        False, description="of vLLM; only false"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = self._given()
        if len(given) != 1:
            found = " and ".join(f"'{name}'" for name in given) or "none"
            names = ", ".join(f"'{name}'" for name in _KINDS)
            raise InvalidRequest(f"'structured_outputs' takes exactly one of {names}; found {found}")
        return self

    def _given(self) -> list[str]:
        values = (self.json_schema, self.json_object or None, self.regex, self.choice, self.grammar)
        pairs = zip(_KINDS, (*values, self.structural_tag), strict=True)
        return [name for name, value in pairs if value is not None]

    def structure(self) -> Structure:
        """What the grammar compiler is asked for; `param` is the field's own path."""
        name = self._given()[0]
        param = f"structured_outputs.{name}"
        match name:
            case "json":
                return Structure("json_schema", self.json_schema or "", param)
            case "json_object":
                return Structure("json_object", "", param)
            case "choice":
                return Structure("choice", json.dumps(self.choice, ensure_ascii=False), param)
            case "regex":
                return Structure("regex", self.regex or "", param)
            case "grammar":
                return Structure("grammar", self.grammar or "", param)
            case _:
                return Structure("structural_tag", self.structural_tag or "", param)
