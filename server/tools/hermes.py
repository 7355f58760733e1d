"""Hermes, Qwen2.5, Qwen3 and many others: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.tools.calls import Tool, ToolCall
from server.tools.format import Format, ToolFormat, call_tag, register, separated
from server.tools.parser import Form

BEGIN, END = "<tool_call>", "</tool_call>"


def call_json(call: ToolCall, arguments: str = "arguments") -> str:
    return f'{{"name": {json.dumps(call.name)}, "{arguments}": {call.arguments}}}'


@register
class Hermes(ToolFormat):
    """One object in each pair of tags. A list in one pair of tags is read, too: small models write it."""

    name = "hermes"
    form = Form(BEGIN, END, arguments=("arguments", "parameters"), lists=True)

    @classmethod
    def fits(cls, template: str) -> bool:
        """Some models have XML in the same tags, which is another format."""
        return BEGIN in template and not any(other in template for other in ("<function=", "<arg_key>"))

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{BEGIN}\n{call_json(call)}\n{END}" for call in calls)

    def tags(self, tools: Sequence[Tool], *, parallel: bool) -> list[Format]:
        return [call_tag(tool, f"{BEGIN}\n", f"\n{END}") for tool in tools]

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        return separated(self.tags(tools, parallel=parallel), "\n", parallel=parallel)
