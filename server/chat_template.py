"""A model's chat template: what it knows, found out by rendering, and prompts made with it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from engine.types import InvalidRequest
from server.protocol import strict_json
from server.tools import Tool, ToolCall, ToolFormat, format_for

if TYPE_CHECKING:
    from server.protocol.chat import ChatBody
    from server.protocol.messages import Message

# a template runs on what the client sent: what it trips over is the client's
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_OURS = {  # what no request may set, whatever a template reads
    *("messages", "xml_tools", "custom_tools"),
    *("raise_exception", "strftime_now", "namespace", "dict"),
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
}
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_PROBE = "disco_probe"

TemplateMessage = dict[str, Any]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the template is none that could be compiled: every chat would fail by it."""
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise ValueError(f"its chat template is no text but a {type(template).__name__}")
    try:
        _environment().compile(_without_tags(_texts(template)))
    except _REFUSALS as error:
        raise ValueError(f"its chat template does not compile: {error}") from error


class ChatTemplate:
    """Renders conversations. Not for several threads at once; the first use probes the template.

    `format`: how the model writes tool calls; None if no known format fits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_format: str = "auto") -> None:
        """Raises ValueError for an unknown tool format."""
        self._tokenizer = tokenizer
        self.text = _texts(tokenizer.chat_template)
        self.format: ToolFormat | None = format_for(self.text, tool_format)
        self.variables = _variables(self.text) - _OURS - set(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {i: token.content for i, token in added if token.special}
        self._known: _Knowledge | None = None
        self._functions: str | None = None  # the variable that tools are given in, if it is not `tools`

    def render(self, body: ChatBody) -> str:
        """The prompt of a chat request. Raises InvalidRequest with the template's message, and for tools
        or variables that the template does not know."""
        if not self.text:
            message = "the model has no chat template; use /v1/completions"
            raise InvalidRequest(message, "messages", "no_chat_template")
        tools = body.offered()
        messages = self._messages(body.messages)
        if tools and not self._knowledge().tools:
            instructions = self.call_format().instructions(tools)
            if instructions is None:
                message = "the model's chat template knows no tools"
                raise InvalidRequest(message, "tools", "unsupported_tools")
            messages, tools = _instructed(messages, instructions), ()
        if body.add_generation_prompt is None:
            answer_next = not body.continue_final_message
        else:
            answer_next = body.add_generation_prompt
        variables = self._variables_of(body)
        variables |= {
            "add_generation_prompt": answer_next,
            "continue_final_message": body.continue_final_message,
        }
        try:
            return self._apply(messages, tools, variables)
        except _REFUSALS as error:
            message = f"the chat template refuses these messages: {error}"
            raise InvalidRequest(message, "messages", "chat_template_error") from error

    def call_format(self, param: str = "tools") -> ToolFormat:
        """How the model writes calls. Raises InvalidRequest for `param` if that is not known."""
        if self.format is None:
            message = "the model's chat template does not say how it calls tools, in a form known here"
            raise InvalidRequest(message, param, "unsupported_tools")
        return self.format

    def special_ids(self, kept: Collection[str]) -> frozenset[int]:
        """Ids of the special tokens, which are no part of an answer's text, but for those in `kept`."""
        return frozenset(i for i, content in self._special.items() if content not in kept)

    def _apply(
        self, messages: list[TemplateMessage], tools: Sequence[Tool], variables: dict[str, Any]
    ) -> str:
        sources: list[Any] | None = [tool.source for tool in tools] or None
        if sources and self._functions is not None:
            variables = variables | {self._functions: [source["function"] for source in sources]}
            sources = None
        return str(self._tokenizer.apply_chat_template(messages, sources, tokenize=False, **variables))

    def _variables_of(self, body: ChatBody) -> dict[str, Any]:
        """The request's own variables of the template. Raises InvalidRequest for those it does not have."""
        for name in body.chat_template_kwargs:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                message = f"the model's chat template has no variable '{name[:64]}' to set; it has: {known}"
                raise InvalidRequest(message, "chat_template_kwargs", "unsupported_field")
        if body.reasoning_effort is None:
            return dict(body.chat_template_kwargs)
        if "reasoning_effort" not in self.variables:
            message = "'reasoning_effort' is not supported: the model's chat template has no such variable"
            raise InvalidRequest(message, "reasoning_effort", "unsupported_field")
        if "reasoning_effort" in body.chat_template_kwargs:
            message = "'reasoning_effort' is in 'chat_template_kwargs', too"
            raise InvalidRequest(message, "reasoning_effort")
        return {"reasoning_effort": body.reasoning_effort} | body.chat_template_kwargs

    def _messages(self, messages: Sequence[Message]) -> list[TemplateMessage]:
        """Messages in the form that the template takes; calls as text if it leaves them out."""
        names = {call.id: call.function.name for message in messages for call in message.tool_calls}
        native = not names or self._knowledge().calls
        result: list[TemplateMessage] = []
        answers: list[str] = []  # of tools, in a row
        for message in messages:
            if message.role == "tool" and not native:
                answers.append(self.call_format("messages").result_text(message.text))
                continue
            _flush(answers, result)
            result.append(self._message(message, names, native))
        _flush(answers, result)
        return result

    def _message(self, message: Message, names: Mapping[str, str], native: bool) -> TemplateMessage:
        role = "system" if message.role == "developer" else message.role
        made: TemplateMessage = {"role": role, "content": message.text}
        if message.name is not None:
            made["name"] = message.name
        if message.reasoning_content:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_call_id is not None:
            made["tool_call_id"] = self._call_id(message.tool_call_id)
            made.setdefault("name", names[message.tool_call_id])
        if message.tool_calls and native:
            made["tool_calls"] = [
                {
                    "id": self._call_id(call.id),
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": self._call_arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        elif message.tool_calls:
            calls = [
                ToolCall(c.id, c.function.name, c.function.arguments or "{}") for c in message.tool_calls
            ]
            text = self.call_format("messages").calls_text(calls)
            made["content"] = f"{message.text}\n{text}" if message.text else text
        return made

    def _call_id(self, call_id: str) -> str:
        return call_id if self.format is None else self.format.template_id(call_id)

    def _call_arguments(self, text: str) -> Any:
        """An object where the template takes objects; what is no JSON object stays the text that it is."""
        if not self._knowledge().objects:
            return text
        try:
            value = strict_json.loads(text or "{}")
        except ValueError:
            return text
        return value if isinstance(value, dict) else text

    def _knowledge(self) -> _Knowledge:
        if self._known is None:
            self._known = self._probe()
        return self._known

    def _probe(self) -> _Knowledge:
        tool = _probe_tool()
        tools = tool.name in self._try([_USER], [tool])
        if not tools and self.format is not None and self.format.functions_variable is not None:
            self._functions = self.format.functions_variable
            tools = tool.name in self._try([_USER], [tool])
        for objects in (True, False):
            text = self._try(_called(objects, self._call_id("abcdefghi")), [tool] if tools else [])
            if '"probe_key"' in text and "probe_called" in text and "probe_result" in text:
                return _Knowledge(tools, True, objects)
        return _Knowledge(tools, False, True)

    def _try(self, messages: list[TemplateMessage], tools: Sequence[Tool]) -> str:
        try:
            return self._apply(messages, tools, {"add_generation_prompt": True})
        except _REFUSALS:
            return ""


@dataclass(frozen=True)
class _Knowledge:
    """What a template does with tools."""

    tools: bool  # it tells of them
    calls: bool  # it renders calls of earlier turns, and their results
    objects: bool  # it takes arguments as objects, not as text


_USER = {"role": "user", "content": "probe"}


def _probe_tool() -> Tool:
    parameters = {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe"}}}
    function = {"name": _PROBE, "description": "probe", "parameters": parameters}
    return Tool(_PROBE, parameters, False, {"type": "function", "function": function})


def _called(objects: bool, call_id: str) -> list[TemplateMessage]:
    """A conversation with a call and its result."""
    arguments: Any = {"probe_key": "probe_value"}
    function = {"name": "probe_called", "arguments": arguments if objects else json.dumps(arguments)}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "probe_result", "name": "probe_called", "tool_call_id": call_id},
    ]


def _instructed(messages: list[TemplateMessage], instructions: str) -> list[TemplateMessage]:
    """The messages with `instructions` in the system message, which is made if there is none."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    first = {**messages[0], "content": f"{messages[0]['content']}\n\n{instructions}"}
    return [first, *messages[1:]]


def _flush(answers: list[str], messages: list[TemplateMessage]) -> None:
    """Answers of tools in a row are one message of the user: templates may want turns to alternate."""
    if answers:
        messages.append({"role": "user", "content": "\n".join(answers)})
        answers.clear()


def _texts(template: str | dict[str, str] | None) -> str:
    """The template; where there are several, those that chats use."""
    if isinstance(template, dict):
        return "\n".join(template[name] for name in ("default", "tool_use") if name in template)
    return template or ""


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])


def _without_tags(template: str) -> str:
    """Without tags that only training reads."""
    return _GENERATION_TAG.sub("", template)


def _variables(template: str) -> set[str]:
    """The names that a template reads and does not set."""
    try:
        return meta.find_undeclared_variables(_environment().parse(_without_tags(template)))
    except TemplateError:  # rendering will tell
        return set()
