"""Tools in a chat request: the functions, the choice among them, and calls of earlier turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from engine.types import InvalidRequest
from server.protocol.base import Body
from server.tools.calls import Tool

MAX_TOOLS = 128
"""OpenAI's bound."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
_FUNCTIONS_ONLY = "only functions of the client can be called"


def check_name(value: Any, info: ValidationInfo) -> Any:
    """The name of a function, or of a schema, as OpenAI bounds it. Raises InvalidRequest."""
    if isinstance(value, str) and _NAME.fullmatch(value) is None:
        message = f"'{info.field_name}' must be 1 to 64 letters, digits, '_' or '-'; found {value[:80]!r}"
        raise InvalidRequest(message, code="invalid_value")
    return value


Name = Annotated[str, BeforeValidator(check_name), Field(pattern=_PATTERN)]


def _function_only(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        message = f"tools of type '{value[:64]}' are not supported: {_FUNCTIONS_ONLY}"
        raise InvalidRequest(message, code="unsupported_tool")
    return value


FunctionType = Annotated[Literal["function"], BeforeValidator(_function_only)]


class Function(Body):
    """A function that the model may call."""

    name: Name = Field(description="1 to 64 letters, digits, `_` or `-`")
    description: str | None = Field(None, description="what it does, for the model")
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of its arguments, of the type object; default: it takes none"
    )
    strict: bool = Field(
        False, description="hold arguments to the schema; required and named choices always do"
    )

    @field_validator("parameters")
    @classmethod
    def _an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if value.get("type", "object") != "object":
            raise InvalidRequest("the schema of a function's parameters must have the type 'object'")
        if not isinstance(value.get("properties", {}), dict):
            raise InvalidRequest("'properties' of a schema must be an object")
        return value


class ToolBody(Body):
    """A tool; functions are the only kind."""

    type: FunctionType = Field(description="only `function`")
    function: Function = Field(description="the function")

    def tool(self) -> Tool:
        """As parsers, grammars and templates take it."""
        function = self.function
        shown: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            shown["description"] = function.description
        shown["parameters"] = function.parameters or {"type": "object", "properties": {}}
        source = {"type": "function", "function": shown}
        return Tool(function.name, function.parameters, function.strict, source)


class NamedFunction(Body):
    name: str = Field(min_length=1, max_length=64, description="the name of one of `tools`")


class NamedTool(Body):
    """The function that must be called."""

    type: FunctionType = Field(description="only `function`")
    function: NamedFunction = Field(description="which function")


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise InvalidRequest(f"'tool_choice' is none, auto, required or a function, not '{value[:64]}'")
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function":
        message = f"a tool choice of type '{value['type'][:64]}' is not supported: {_FUNCTIONS_ONLY}"
        raise InvalidRequest(message, code="unsupported_tool")
    if isinstance(value, dict):
        return NamedTool.model_validate(value)
    if not isinstance(value, str | NamedTool):
        raise InvalidRequest("'tool_choice' is none, auto, required or a function")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]


def check_tools(tools: Sequence[ToolBody], choice: str | NamedTool | None) -> None:
    """Raises InvalidRequest for names that come twice, and for a choice that cannot be made."""
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"two tools have the name '{name}'", f"tools[{index}].function.name")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        message = f"no tool has the name '{choice.function.name}' that 'tool_choice' asks for"
        raise InvalidRequest(message, "tool_choice.function.name")
    if choice == "required" and not tools:
        raise InvalidRequest("'tool_choice' is 'required', but there are no tools", "tool_choice")


class CalledFunction(Body):
    name: str = Field(min_length=1, description="the function's name")
    arguments: str = Field(description="its arguments, JSON text as it was answered")


class ToolCallBody(Body):
    """A call of an earlier answer."""

    unsupported: ClassVar[Mapping[str, str]] = {"custom": _FUNCTIONS_ONLY}

    id: str = Field(min_length=1, description="the call's id, as it was answered")
    type: FunctionType = Field("function", description="only `function`")
    function: CalledFunction = Field(description="what was called")
    index: int | None = Field(None, description="its place, as streams have it; changes nothing")
