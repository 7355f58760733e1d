"""`response_format` of a chat request, and what it asks of the answer."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from engine.types import InvalidRequest
from server.grammar import Structure
from server.protocol.base import Body
from server.protocol.tools import Name


class JsonSchema(Body):
    """A named schema. It is held to in any case, `strict` or not."""

    name: Name = Field(description="1 to 64 letters, digits, `_` or `-`")
    description: str | None = Field(None, description="accepted; the model is not told of it")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="a JSON schema; default: any object"
    )
    strict: bool = Field(False, description="accepted; answers are held to the schema in any case")


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON that obeys a schema."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="what the answer is")
    json_schema: JsonSchema | None = Field(None, description="of the type json_schema, which needs it")

    @model_validator(mode="after")
    def _schema_if_asked(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidRequest("the type json_schema needs the field 'json_schema'", "json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequest("'json_schema' is of the type json_schema only", "json_schema")
        return self

    def structure(self) -> Structure | None:
        """What the answer must look like; None: anything goes."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return Structure("json_object", "", "response_format")
        text = json.dumps(self.json_schema.schema_, ensure_ascii=False)
        return Structure("json_schema", text, "response_format.json_schema.schema")
