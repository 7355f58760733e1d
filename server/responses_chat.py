"""A Responses request as the chat request that asks the same: one way to prompts and answers for both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.types import InvalidRequest
from server.protocol import body as bodies
from server.protocol.chat import ChatBody
from server.protocol.common import GenerationBody
from server.protocol.responses import JsonSchemaFormat, ResponsesBody, TextFormat, ToolChoiceFunction
from server.protocol.responses_input import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
)

_OWN = {"stream", "stream_options", "n"}
_SHARED = GenerationBody.model_fields.keys() - _OWN
_RENAMED = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
}
_END = re.compile(r"[.\[]")
_NESTED = re.compile(r"\.(function|json_schema)(?![^.\[])")  # objects that this API does without


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat request with the same prompt and the same answer. Raises InvalidRequest as chat does,
    with this request's name of the field."""
    data = body.model_dump(mode="json", by_alias=True, include=_SHARED, exclude_unset=True)
    data["messages"] = messages(body.items, body.instructions)
    data |= _tools(body) | _format(body)
    if body.max_output_tokens is not None:
        data["max_completion_tokens"] = body.max_output_tokens
    if body.logprobs:
        data |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.reasoning.effort is not None:
        data["reasoning_effort"] = body.reasoning.effort
    try:
        return bodies.validate(ChatBody, data)
    except InvalidRequest as error:
        raise renamed(error) from error


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same error with this request's name of the field that chat names.

    An item of the input is named only by what led to it: several items may be one message.
    """
    message, param = error.message, None
    for name, own in _RENAMED.items():
        message = message.replace(f"'{name}'", f"'{own}'")
    if error.param is not None:
        field = _END.split(error.param, maxsplit=1)[0]
        inner = "" if field == "messages" else _NESTED.sub("", error.param.removeprefix(field))
        param = _RENAMED.get(field, field) + inner
        message = message.replace(f"'{error.param}'", f"'{param}'")
    return InvalidRequest(message, param, error.code)


def messages(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Chat's messages. What the model said in one turn is one message: reasoning, text, calls.

    Raises InvalidRequest for an output without its call.
    """
    result: list[dict[str, Any]] = []
    if instructions is not None:
        result.append({"role": "system", "content": instructions})
    called: set[str] = set()
    turn: dict[str, Any] | None = None  # the model's message that items still go into
    for i, item in enumerate(items):
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id not in called:
                fault = f"no function_call with the call_id '{item.call_id[:64]}' comes before its output"
                raise InvalidRequest(fault, f"input[{i}].call_id")
            result.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            turn = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            result.append({"role": item.role, "content": item.content})
            turn = None
        else:
            if turn is None or _begins(item, turn):
                turn = {"role": "assistant", "content": None}
                result.append(turn)
            if isinstance(item, FunctionCallItem):
                called.add(item.call_id)
            _add(item, turn)
    for message in result:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""  # a turn that ended in its thoughts
    return result


def _begins(item: Item, turn: dict[str, Any]) -> bool:
    """Whether `item` cannot be of the turn: a text after a text, or a thought after anything."""
    if isinstance(item, ReasoningItem):
        return turn["content"] is not None or "tool_calls" in turn
    return isinstance(item, MessageItem) and turn["content"] is not None and "tool_calls" not in turn


def _add(item: Item, turn: dict[str, Any]) -> None:
    match item:
        case ReasoningItem():
            turn["reasoning_content"] = turn.get("reasoning_content", "") + item.text
        case MessageItem():
            turn["content"] = (turn["content"] or "") + item.content
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)


def _tools(body: ResponsesBody) -> dict[str, Any]:
    """Chat's fields of tools. Without tools chat has none of them, and needs none."""
    choice = body.tool_choice
    if isinstance(choice, ToolChoiceFunction):
        wanted: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        wanted = choice
    if not body.tools:
        return {} if wanted in ("auto", "none") else {"tool_choice": wanted}
    tools = []
    for tool in body.tools:
        function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
        tools.append({"type": "function", "function": function})
    return {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": body.parallel_tool_calls}


def _format(body: ResponsesBody) -> dict[str, Any]:
    match body.text.format:
        case TextFormat():
            return {}
        case JsonSchemaFormat() as chosen:
            inner = chosen.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            return {"response_format": {"type": "json_schema", "json_schema": inner}}
        case chosen:
            return {"response_format": {"type": chosen.type}}
