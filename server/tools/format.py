"""What a tool-call format must say of itself, and the registry of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from server.tools.calls import Tool, ToolCall
from server.tools.parser import CallParser, Form

Format = dict[str, Any]
"""A format of xgrammar's structural tags."""

_FORMATS: dict[str, type[ToolFormat]] = {}


class ToolFormat:
    """How one family of models is told of tools and writes calls. One file, one class, one `@register`."""

    name: ClassVar[str]
    form: ClassVar[Form]
    functions_variable: ClassVar[str | None] = None
    """The template's own variable for a list of functions, where it does not read `tools`."""
    rank: ClassVar[int] = 0
    """Of the formats that fit a template the highest is taken."""

    @classmethod
    def fits(cls, template: str) -> bool:
        """Whether a chat template is of the family."""
        return cls.form.begin in template

    @property
    def markers(self) -> tuple[str, ...]:
        """What must stay in the text for the parser, also where it is a special token."""
        return (self.form.begin, self.form.end, *self.form.inner)

    def parser(
        self, names: Collection[str], *, sure: bool = False, only: bool = False, begun: bool = False
    ) -> CallParser:
        """Reads one answer. `sure`: a grammar holds it to the form, `only`: which has nothing but calls;
        `begun`: it goes on with a text."""
        return CallParser(self.form, names, self.new_id, sure=sure, only=only, begun=begun)

    def new_id(self) -> str:
        return f"call_{uuid4().hex[:24]}"

    def template_id(self, call_id: str) -> str:
        """A client's call id as the family's templates take it."""
        return call_id

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        """A system message that tells of the tools, for templates that do not; None: there is none."""
        return None

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Calls of an earlier turn as the model would have written them, for templates that do not."""
        raise NotImplementedError

    def result_text(self, content: str) -> str:
        """A tool's answer as a user's message, for templates that have no role for it."""
        return f"<tool_response>\n{content}\n</tool_response>"

    def called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        """The structural tag of an answer that calls: one or more of `tools`, one if not `parallel`."""
        raise NotImplementedError

    def maybe_called(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        """The structural tag of an answer that may call, and holds any text besides."""
        return {
            "type": "triggered_tags",
            "triggers": [self.form.begin],
            "tags": self.tags(tools, parallel=parallel),
            "at_least_one": False,
            "stop_after_first": not parallel,
        }

    def tags(self, tools: Sequence[Tool], *, parallel: bool) -> list[Format]:
        """Structural tags, each from a begin marker to its end marker: one for each tool, or for a list."""
        raise NotImplementedError


def call_tag(tool: Tool, before: str, after: str, arguments: str = "arguments") -> Format:
    """A call as a JSON object with something around it; the arguments obey the tool's schema."""
    begin = f'{before}{{"name": {json.dumps(tool.name)}, "{arguments}": '
    return {"type": "tag", "begin": begin, "content": arguments_of(tool), "end": "}" + after}


def arguments_of(tool: Tool) -> Format:
    """Arguments that obey the tool's schema; a function without one takes none."""
    nothing = {"properties": {}, "additionalProperties": False}
    parameters = nothing if tool.parameters is None else tool.parameters
    return schema_format({"type": "object"} | parameters)


def schema_format(schema: Any) -> Format:
    """JSON of a schema. Runs of white space are short: an answer of blanks alone would never end."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 2}


def separated(tags: list[Format], separator: str, *, parallel: bool) -> Format:
    """One or more of `tags`, exactly one if not `parallel`."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def register(cls: type[ToolFormat]) -> type[ToolFormat]:
    """Adds a format under its name."""
    _FORMATS[cls.name] = cls
    return cls


def names() -> list[str]:
    return sorted(_FORMATS)


def by_name(name: str) -> ToolFormat:
    """Raises ValueError for a name that is not registered."""
    if name not in _FORMATS:
        raise ValueError(f"no tool format {name!r}; there are: {', '.join(names())}")
    return _FORMATS[name]()


def by_template(template: str) -> ToolFormat | None:
    """The format that fits a chat template; None if none does."""
    found = [cls for cls in _FORMATS.values() if cls.fits(template)]
    return max(found, key=lambda cls: cls.rank)() if found else None
