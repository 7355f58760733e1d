"""What a chat's answer must look like: the format asked for, tool calls, and reasoning before either."""

from __future__ import annotations

import json
from dataclasses import replace

from engine.types import InvalidRequest
from server.grammar import Structure
from server.protocol.chat import ChatBody
from server.reasoning import BEGIN, END, Place
from server.tools import ToolFormat
from server.tools.format import Format, schema_format

_GAP: Format = {"type": "regex", "pattern": r"\n{0,2}"}


def holds_calls(body: ChatBody) -> bool:
    """Whether a grammar holds the answer's calls to their form: it need not for what is only offered."""
    if not body.callable():
        return False
    strict = any(tool.strict for tool in body.callable())
    return body.forced or not body.parallel or strict or body.structure() is not None


def structure_of(body: ChatBody, calls: ToolFormat | None, place: Place | None) -> Structure | None:
    """What the answer must look like, calls and reasoning included; None: anything goes.

    `calls`: how the model calls, None if it has no tools. `place`: where in think tags the answer begins,
    None if there are none.
    """
    asked = body.structure()
    if calls is not None and holds_calls(body):
        return _tag(_thought(_calls(body, calls, asked), place), "tools" if asked is None else asked.param)
    if asked is None or place in (None, Place.CLOSED, Place.ANSWER):
        return asked
    return _tag(_thought(_format(asked), place), asked.param)


def tool_schemas(body: ChatBody) -> list[Structure]:
    """The schemas that calls are held to, one by one: checking them tells whose cannot be followed."""
    held = {tool.name for tool in body.callable() if body.forced or tool.strict}
    return [
        Structure("check", json.dumps(tool.function.parameters or {}), f"tools[{i}].function.parameters")
        for i, tool in enumerate(body.tools)
        if tool.function.name in held
    ]


def _calls(body: ChatBody, calls: ToolFormat, asked: Structure | None) -> Format:
    tools, parallel = body.callable(), body.parallel
    if body.forced:
        return calls.called(tools, parallel=parallel)
    # where calls are only offered, only those of strict tools are held to a schema
    loose = [tool if tool.strict else replace(tool, parameters={}) for tool in tools]
    if asked is None:
        return calls.maybe_called(loose, parallel=parallel)
    return {"type": "or", "elements": [calls.called(loose, parallel=parallel), _format(asked)]}


def _thought(answer: Format, place: Place | None) -> Format:
    """`answer` after the reasoning that comes before it, or may come."""
    match place:
        case Place.START:
            tag = {"type": "tag", "begin": BEGIN, "content": {"type": "any_text"}, "end": END}
            thought: Format = {"type": "optional", "content": {"type": "sequence", "elements": [tag, _GAP]}}
        case Place.OPENED | Place.THINKING:
            tag = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": END}
            thought = {"type": "sequence", "elements": [tag, _GAP]}
        case _:
            return answer
    return {"type": "sequence", "elements": [thought, answer]}


def _format(structure: Structure) -> Format:
    """A structure as a part of a structural tag. Raises InvalidRequest for a tag of the older kind."""
    text = structure.text
    match structure.kind:
        case "json_schema":
            return schema_format(json.loads(text))
        case "json_object":
            return schema_format({"type": "object"})
        case "regex":
            return {"type": "regex", "pattern": text}
        case "choice":
            words = [{"type": "const_string", "value": word} for word in json.loads(text)]
            return {"type": "or", "elements": words}
        case "grammar":
            return {"type": "grammar", "grammar": text}
    tag = json.loads(text)
    if not isinstance(tag.get("format"), dict):
        message = "a structural tag needs a 'format' to go with tools or reasoning"
        raise InvalidRequest(message, structure.param, "invalid_grammar")
    return dict(tag["format"])


def _tag(form: Format, param: str) -> Structure:
    text = json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)
    return Structure("structural_tag", text, param)
