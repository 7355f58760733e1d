"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": ...}]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Sequence

from server.tools.calls import Tool, ToolCall
from server.tools.format import Format, ToolFormat, arguments_of, call_tag, register, separated
from server.tools.hermes import call_json
from server.tools.parser import Form

_BEGIN = "[TOOL_CALLS]"
_HEAD = re.compile(r"([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9]{1,64})?\s*(?:\[ARGS\])?\s*(?=\{)")
_LONGEST_HEAD = 256
_ALPHABET = string.ascii_letters + string.digits
_ID = re.compile("[a-zA-Z0-9]{9}")


def _head(text: str) -> tuple[int, str | None] | None:
    match = _HEAD.match(text)
    if match is not None:
        return match.end(), match[1]
    return None if "{" not in text and len(text) < _LONGEST_HEAD else (-1, None)


@register
class Mistral(ToolFormat):
    """Call ids are nine letters or digits: Mistral's templates refuse others."""

    name = "mistral"
    form = Form(_BEGIN, lists=True, head=_head, inner=("[ARGS]", "[CALL_ID]"))

    def new_id(self) -> str:
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))

    def template_id(self, call_id: str) -> str:
        if _ID.fullmatch(call_id):
            return call_id
        digest = hashlib.blake2b(call_id.encode(), digest_size=9).digest()
        return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest)

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return f"{_BEGIN}[" + ", ".join(call_json(call) for call in calls) + "]"

    def tags(self, tools: Sequence[Tool], *, parallel: bool) -> list[Format]:
        return [self.called(tools, parallel=parallel)]

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        calls = separated([call_tag(tool, "", "") for tool in tools], ", ", parallel=parallel)
        return {"type": "tag", "begin": f"{_BEGIN}[", "content": calls, "end": "]"}


@register
class MistralNamed(Mistral):
    """The newer form, of templates that write [ARGS]: each call has a marker of its own."""

    name = "mistral-args"
    rank = 1

    @classmethod
    def fits(cls, template: str) -> bool:
        return _BEGIN in template and "[ARGS]" in template

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        return "".join(f"{_BEGIN}{call.name}[ARGS]{call.arguments}" for call in calls)

    def tags(self, tools: Sequence[Tool], *, parallel: bool) -> list[Format]:
        return [
            {"type": "tag", "begin": f"{_BEGIN}{tool.name}[ARGS]", "content": arguments_of(tool), "end": ""}
            for tool in tools
        ]

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        tag = {"type": "or", "elements": self.tags(tools, parallel=parallel)}
        return {"type": "plus", "content": tag} if parallel else tag
