"""One answer's text as a client is told of it: reasoning, content, tool calls. Chat and responses use it."""

from __future__ import annotations

from dataclasses import dataclass

from server.reasoning import Place, ThinkSplitter
from server.tools.calls import ToolCall, ToolDelta
from server.tools.parser import CallParser

__all__ = ["Delta", "ToolCall", "ToolDelta", "TurnReader"]


@dataclass(frozen=True)
class Delta:
    """What is new since the last delta. `parts`: content and calls in their order, which may alternate.

    `spans`: where each piece of content lies in the raw text, from start to before end, in characters.
    """

    reasoning: str = ""
    parts: tuple[str | ToolDelta, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def content(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def tool_calls(self) -> tuple[ToolDelta, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolDelta))

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.parts)


class TurnReader:
    """Splits one answer's text as it comes. Nothing told is taken back, and no half of a marker is told.

    The deltas add up to `content`, `reasoning` and `tool_calls`, which are whole after a final push; they
    are the same for any chunking of the text.
    """

    def __init__(self, calls: CallParser | None = None, place: Place | None = None) -> None:
        """`calls`: None if the answer cannot call. `place`: None if the template has no think tags."""
        self.content = ""
        self.reasoning = ""
        self.tool_calls: list[ToolCall] = []
        self._calls = calls
        self._splitter = None if place is None else ThinkSplitter(place)
        self._read = 0  # characters of the raw text
        self._said = 0  # of these, after the reasoning

    @property
    def called(self) -> bool:
        """The answer has calls, all of them whole: a `finish_reason` "stop" is "tool_calls" then."""
        return bool(self.tool_calls) and self._calls is not None and not self._calls.cut

    @property
    def reasoning_end(self) -> int | None:
        """Characters of the raw text that are reasoning, tags included; None while it goes on."""
        return 0 if self._splitter is None else self._splitter.end

    def push(self, text: str, *, final: bool) -> Delta:
        """Takes the next piece of text in, which may be empty. `final`: nothing follows."""
        self._read += len(text)
        reasoning = ""
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text, final=final)
        self._said += len(text)
        parts: list[str | ToolDelta] = [text] if text else []
        spans = [(self._said - len(text), self._said)] if text else []
        if self._calls is not None:
            parts = self._calls.push(text, final=final)
            spans = self._calls.spans
        self.reasoning += reasoning
        for part in parts:
            self._add(part)
        before = self._read - self._said  # what is said goes on to the end of what is read
        return Delta(reasoning, tuple(parts), tuple((before + start, before + end) for start, end in spans))

    def _add(self, part: str | ToolDelta) -> None:
        if isinstance(part, str):
            self.content += part
            return
        if part.id is not None:
            self.tool_calls.append(ToolCall(part.id, part.name or "", ""))
        self.tool_calls[part.index].arguments += part.arguments
