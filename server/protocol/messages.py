"""The messages of a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.types import InvalidRequest
from server.protocol.base import Body
from server.protocol.parts import REFUSAL, TEXT_ONLY, Part, text_of, text_schema
from server.protocol.tools import ToolCallBody

_USE_TOOLS = "it is the older name of tools; use 'tools' and 'tool_calls'"


def _role(value: Any) -> Any:
    if value == "function":
        message = f"the role 'function' is not supported: {_USE_TOOLS}"
        raise InvalidRequest(message, code="unsupported_role")
    return value


_KINDS = (Part("text"), REFUSAL)
Content = Annotated[str, BeforeValidator(text_of(*_KINDS)), WithJsonSchema(text_schema(*_KINDS))]
Role = Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]

_ASSISTANT = ("refusal", "tool_calls", "reasoning_content", "annotations")


class Message(Body):
    """One turn. `developer` is OpenAI's newer name for `system`, and is given to the template as such."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "function_call": _USE_TOOLS,
        "audio": TEXT_ONLY,
        "reasoning": "its name is 'reasoning_content' here",
    }

    role: Role = Field(description="who speaks")
    content: Content | None = Field(
        None, description="a string, or text parts; may be left out of an assistant's message with tool calls"
    )
    name: str | None = Field(None, description="the speaker's name, for templates that show it")
    tool_calls: list[ToolCallBody] = Field([], description="of an assistant: what it called")
    tool_call_id: str | None = Field(None, description="of a tool: the id of the call that it answers")
    refusal: str | None = Field(None, description="of an assistant: taken as text")
    reasoning_content: str | None = Field(
        None, description="of an assistant: its reasoning, for templates that show that of earlier turns"
    )
    annotations: list[Any] = Field([], max_length=0, description="of an assistant: only empty")

    @model_validator(mode="after")
    def _fits_the_role(self) -> Message:
        if self.role != "assistant":
            for name in _ASSISTANT:
                if getattr(self, name):
                    raise InvalidRequest(f"'{name}' is of assistant messages only", name)
        if (self.tool_call_id is not None) != (self.role == "tool"):
            message = "a tool's message, and no other, has the 'tool_call_id' of the call that it answers"
            raise InvalidRequest(message, "tool_call_id")
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise InvalidRequest("the field 'content' is required", "content", "missing_field")
        return self

    @property
    def text(self) -> str:
        """Content and refusal: what was said."""
        return (self.content or "") + (self.refusal or "")


def check_calls(messages: Sequence[Message]) -> None:
    """Raises InvalidRequest for a tool's message that answers no call before it."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls)
        if message.tool_call_id is not None and message.tool_call_id not in called:
            fault = f"no tool call with the id '{message.tool_call_id[:64]}' comes before its answer"
            raise InvalidRequest(fault, f"messages[{index}].tool_call_id")
