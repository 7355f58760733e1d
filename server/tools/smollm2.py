"""SmolLM2: a list in one pair of tags, `<tool_call>[{"name": ..., "arguments": ...}, ...]</tool_call>`.

Its chat template knows no tools: they are told in a system message, as the model was taught.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.tools.calls import Tool, ToolCall
from server.tools.format import Format, ToolFormat, call_tag, register, separated
from server.tools.hermes import BEGIN, END, call_json
from server.tools.parser import Form

_INSTRUCTIONS = """You can call functions. These are the tools that you have:
<tools>{tools}</tools>

To call one or more of them, answer with nothing but the calls, in this form:
<tool_call>[
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
]</tool_call>
Use arguments of the right type. If no function fits, or something it needs is missing, answer in words."""


@register
class SmolLM2(ToolFormat):
    """The end of the list's JSON and of the tag are the end of the calls."""

    name = "smollm2"
    form = Form(BEGIN, END, lists=True)
    rank = 1

    @classmethod
    def fits(cls, template: str) -> bool:
        return "assistant named SmolLM, trained by Hugging Face" in template

    def instructions(self, tools: Sequence[Tool]) -> str:
        return _INSTRUCTIONS.format(tools=json.dumps([tool.source for tool in tools], ensure_ascii=False))

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return f"{BEGIN}[\n" + ",\n".join(call_json(call) for call in calls) + f"\n]{END}"

    def tags(self, tools: Sequence[Tool], *, parallel: bool) -> list[Format]:
        return [self.called(tools, parallel=parallel)]

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        calls = separated([call_tag(tool, "", "") for tool in tools], ",\n", parallel=parallel)
        return {"type": "tag", "begin": f"{BEGIN}[\n", "content": calls, "end": f"\n]{END}"}
