"""The items that a Responses request may hold: messages, function calls and their outputs, reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from engine.types import InvalidRequest
from server.protocol import body as bodies
from server.protocol.base import Body
from server.protocol.parts import REFUSAL, Part, parts_schema, text_of, text_of_parts, text_schema

B = TypeVar("B", bound=Body)
Status = Literal["in_progress", "completed", "incomplete"]

_INPUT = Part("input_text")
_MESSAGE = (_INPUT, Part("output_text", also=("annotations", "logprobs")), REFUSAL)
_SUMMARY, _THOUGHT = Part("summary_text"), Part("reasoning_text")

Text = Annotated[str, BeforeValidator(text_of(*_MESSAGE)), WithJsonSchema(text_schema(*_MESSAGE))]
ToolText = Annotated[str, BeforeValidator(text_of(_INPUT)), WithJsonSchema(text_schema(_INPUT))]
Summary = Annotated[str, BeforeValidator(text_of_parts(_SUMMARY)), WithJsonSchema(parts_schema(_SUMMARY))]
Thought = Annotated[str, BeforeValidator(text_of_parts(_THOUGHT)), WithJsonSchema(parts_schema(_THOUGHT))]


def pick(value: Any, kinds: Mapping[str, type[B]], what: str) -> B:
    """`value` as the model that `kinds` has for its `type`. Raises InvalidRequest that names the type.

    Not pydantic's tagged union: that would put the tag into the path of an error.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind is None:
        raise InvalidRequest(f"{what} needs a 'type'", "type", "missing_field")
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise InvalidRequest(f"{what} must be an object with the string 'type'")
    if kind not in kinds:
        message = f"{what} of type '{kind[:64]}' is not supported; supported: {', '.join(kinds)}"
        raise InvalidRequest(message, "type", "unsupported_field")
    return bodies.validate(kinds[kind], value)


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        message = f"the role '{value}' is chat's: here it is an item of the type 'function_call_output'"
        raise InvalidRequest(message, code="unsupported_role")
    return value


class MessageItem(Body):
    """A message of any side. `id` and `status` are those of an earlier answer and change nothing."""

    unsupported: ClassVar[Mapping[str, str]] = {"phase": "the model has no phases"}

    type: Literal["message"] = "message"
    role: Annotated[Literal["user", "assistant", "system", "developer"], BeforeValidator(_role)] = Field(
        description="developer is OpenAI's newer name of system"
    )
    content: Text = Field(description="text, or parts of the types input_text, output_text and refusal")
    id: str | None = Field(default=None, description="of an earlier answer; changes nothing")
    status: Status | None = Field(default=None, description="of an earlier answer; changes nothing")


class FunctionCallItem(Body):
    """A call that the model made. `arguments` is JSON, as a string."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "namespace": "tools have no namespaces here",
        "caller": "only the model itself calls tools here",
        "async": "tools are called one after the other",
    }

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, description="its output names it")
    name: str = Field(min_length=1, description="the function's name")
    arguments: str = Field(description="JSON, as a string")
    id: str | None = Field(default=None, description="of an earlier answer; changes nothing")
    status: Status | None = Field(default=None, description="of an earlier answer; changes nothing")


class FunctionCallOutputItem(Body):
    """What a call returned. `call_id` is that of a function_call before it."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "namespace": FunctionCallItem.unsupported["namespace"],
        "caller": FunctionCallItem.unsupported["caller"],
    }

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, description="that of the function_call")
    output: ToolText = Field(description="text, or parts of the type input_text")
    name: str | None = Field(None, description="the function's name; changes nothing: the call has it")
    id: str | None = Field(default=None, description="of an earlier answer; changes nothing")
    status: Status | None = Field(default=None, description="of an earlier answer; changes nothing")


class ReasoningItem(Body):
    """What the model thought before it answered; `content` counts, without it the summary."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "encrypted_content": "only the server that encrypted it can read it; send 'content'"
    }

    type: Literal["reasoning"]
    summary: Summary = Field("", description="counts if there is no content")
    content: Thought = Field("", description="the thoughts themselves")
    id: str | None = Field(default=None, description="of an earlier answer; changes nothing")
    status: Status | None = Field(default=None, description="of an earlier answer; changes nothing")

    @property
    def text(self) -> str:
        return self.content or self.summary


Item: TypeAlias = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
_ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}


def _items(value: Any) -> str | list[Item]:
    """`input` with its items read. Raises InvalidRequest that names the item."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest("'input' must be a string or a list of items")
    if not value:
        raise InvalidRequest("'input' must not be empty")
    return [_item(item, f"[{i}]") for i, item in enumerate(value)]


def _item(value: Any, param: str) -> Item:
    if not isinstance(value, dict):
        raise InvalidRequest("an item of 'input' must be an object", param)
    if value.get("type") == "item_reference":
        message = (
            "items of type 'item_reference' are not supported: nothing is kept; send the items themselves"
        )
        raise InvalidRequest(message, f"{param}.type", "unsupported_field")
    try:
        return pick(value if "type" in value else {"type": "message", **value}, _ITEMS, "an item of 'input'")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, _joined(param, error.param), error.code) from error


def _joined(param: str, inner: str | None) -> str:
    if inner is None:
        return param
    return f"{param}{inner}" if inner.startswith("[") else f"{param}.{inner}"


Input = Annotated[str | Annotated[list[Item], Field(min_length=1)], BeforeValidator(_items)]
