"""Llama 3.1 and later: `{"name": ..., "parameters": ...}` as the whole answer, or after <|python_tag|>."""

from __future__ import annotations

from collections.abc import Sequence

from server.tools.calls import Tool, ToolCall
from server.tools.format import Format, ToolFormat, call_tag, register, separated
from server.tools.hermes import call_json
from server.tools.parser import Form

_BEGIN = "<|python_tag|>"


@register
class Llama3(ToolFormat):
    """Several calls are set apart by `;`. JSON further down in an answer is text."""

    name = "llama3"
    form = Form(_BEGIN, arguments=("parameters", "arguments"), bare=True)

    @classmethod
    def fits(cls, template: str) -> bool:
        return _BEGIN in template or ("<|start_header_id|>" in template and '"parameters": ' in template)

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(call_json(call, "parameters") for call in calls)

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        tags = [call_tag(tool, "", "", "parameters") for tool in tools]
        return separated(tags, "; ", parallel=parallel)

    def maybe_called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        words = {"type": "regex", "pattern": r"([^{\s<][\s\S]*)?"}
        return {"type": "or", "elements": [self.called(tools, parallel=parallel), words]}
