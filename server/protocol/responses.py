"""The body of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest
from server.protocol.base import Body
from server.protocol.common import GenerationBody
from server.protocol.fields import INT64, Only
from server.protocol.parts import TEXT_ONLY
from server.protocol.responses_input import Input, Item, MessageItem, pick
from server.protocol.tools import MAX_TOOLS, Name

_KEPT = "responses are not kept; send the whole conversation as 'input'"
_NO_CACHE_CONTROL = "the server caches the beginnings of prompts by itself; see 'cache_salt'"
_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_INCLUDES = (_LOGPROBS, _ENCRYPTED)


class TextFormat(Body):
    """Plain text: what a model writes by itself."""

    type: Literal["text"] = "text"


class JsonObjectFormat(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that a schema describes. `strict` is echoed: the answer follows the schema either way."""

    type: Literal["json_schema"]
    name: Name = Field(description="the schema's name, as a function's; changes nothing")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema")
    description: str | None = Field(None, description="what it is for; changes nothing")
    strict: bool | None = Field(None, description="changes nothing: the answer follows the schema")


Format: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat


class FunctionTool(Body):
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "defer_loading": "all tools are in the prompt",
        "allowed_callers": "only the model itself calls tools here",
        "output_schema": "what a tool returns is not checked",
        "async": "tools are called one after the other",
    }

    type: Literal["function"]
    name: Name = Field(description="1 to 64 letters, digits, `_` or `-`")
    description: str | None = Field(None, description="what it does, for the model")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema; default: no parameters")
    strict: bool | None = Field(
        None, description="hold arguments to the schema; required and named choices always do"
    )


class ToolChoiceFunction(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=64, description="the name of one of `tools`")


_FORMATS: dict[str, type[Format]] = {
    "text": TextFormat,
    "json_object": JsonObjectFormat,
    "json_schema": JsonSchemaFormat,
}


def _format(value: Any) -> Format:
    return pick(value, _FORMATS, "a text format")


def _tool(value: Any) -> FunctionTool:
    return pick(value, {"function": FunctionTool}, "a tool")


def _tool_choice(value: Any) -> str | ToolChoiceFunction:
    if not isinstance(value, str):
        return pick(value, {"function": ToolChoiceFunction}, "a tool choice")
    if value not in ("none", "auto", "required"):
        raise InvalidRequest(f"'tool_choice' is none, auto, required or a function, not '{value[:64]}'")
    return value


class TextConfig(Body):
    """The form of the answer's text."""

    unsupported: ClassVar[Mapping[str, str]] = {"verbosity": "the model has no such setting"}

    format: Annotated[Format, BeforeValidator(_format)] = Field(
        default=TextFormat(), description="plain text, some JSON object, or JSON by a schema"
    )


class Reasoning(Body):
    """How much a model thinks, if its chat template can be told."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "summary": "reasoning is not summed up; it comes whole",
        "generate_summary": "reasoning is not summed up; it comes whole",
        "context": "the chat template decides which reasoning of earlier turns the model sees",
        "mode": "the model has no such setting",
    }

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="what the chat template makes of it, as in chat"
    )


class ResponsesStreamOptions(Body):
    """Fields that are accepted where they ask for what happens anyway."""

    include_obfuscation: Annotated[bool, Only(False, why="events are not padded")] = Field(
        False, description="only false: events are not padded"
    )
    include_usage: Annotated[bool, Only(True, why="usage is always in the last event")] = Field(
        True, description="chat's; only true: usage is always in the last event"
    )


def _include(value: Any) -> Any:
    if not isinstance(value, list):
        raise InvalidRequest("'include' must be a list of strings")
    for i, name in enumerate(value):
        if name not in _INCLUDES:
            message = f"{str(name)[:64]!r} cannot be included; supported: {', '.join(_INCLUDES)}"
            raise InvalidRequest(message, f"[{i}]", "unsupported_field")
    return value


Includes = Annotated[
    list[str],
    BeforeValidator(_include),
    WithJsonSchema({"type": "array", "items": {"enum": list(_INCLUDES)}}),
]
Tools = list[Annotated[FunctionTool, BeforeValidator(_tool)]]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ToolChoiceFunction, BeforeValidator(_tool_choice)
]


class ResponsesBody(GenerationBody):
    """OpenAI's fields and ours. One answer, nothing kept: every request holds its whole conversation."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "previous_response_id": _KEPT,
        "conversation": _KEPT,
        "prompt": "there are no stored prompts",
        "context_management": "a conversation that is too long is refused, never cut",
        "background_options": _KEPT,
        "prompt_cache_options": _NO_CACHE_CONTROL,
        "prompt_cache_retention": _NO_CACHE_CONTROL,
        "moderation": "the server does not moderate",
        "image": TEXT_ONLY,
        "access_programs": "the model has no such setting",
    }

    input: Input = Field(
        description="the conversation: a text of the user, or items (messages, function calls and their "
        "outputs, reasoning)"
    )
    instructions: str | None = Field(None, description="a system message before `input`")
    max_output_tokens: int | None = Field(
        None, ge=1, description="reasoning counts; default: the room left in the context"
    )
    n: int = Field(1, ge=1, le=1, description="a response is one answer")
    include: Includes = Field(
        [],
        description=f"`{_LOGPROBS}`, and `{_ENCRYPTED}`, which changes nothing: reasoning comes in the "
        "open and can be sent back as it is",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description=f"so many others at each token; only with `{_LOGPROBS}`"
    )
    text: TextConfig = Field(TextConfig(), description="the form of the answer's text")
    tools: Tools = Field([], max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: ToolChoice = Field(
        "auto", description="none, auto, required (at least one call) or the function to call"
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer")
    reasoning: Reasoning = Field(Reasoning(), description="how much the model thinks")
    truncation: Annotated[str, Only("disabled", why="a conversation is never cut")] = Field(
        "disabled", description="only disabled: too long a conversation is refused"
    )
    stream_options: ResponsesStreamOptions | None = Field(  # type: ignore[assignment]
        None, description="only with `stream`"
    )
    background: Annotated[bool, Only(False, why=_KEPT)] = Field(
        False, description="only false: a response is made while the client waits"
    )
    max_tool_calls: int | None = Field(
        None,
        ge=1,
        lt=INT64,
        description="the most calls of built-in tools; there are none, so it changes nothing",
    )

    @property
    def items(self) -> list[Item]:
        """`input` as items: a string is a message of the user."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def logprobs(self) -> bool:
        return _LOGPROBS in self.include

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesBody:
        if self.top_logprobs is not None and not self.logprobs:
            message = f"'top_logprobs' is allowed only with '{_LOGPROBS}' in 'include'"
            raise InvalidRequest(message, "top_logprobs")
        if self.max_output_tokens is not None and self.min_tokens > self.max_output_tokens:
            message = (
                f"'min_tokens' ({self.min_tokens}) is above 'max_output_tokens' ({self.max_output_tokens})"
            )
            raise InvalidRequest(message, "min_tokens")
        return self
