"""The output items of a response as they grow, and the events that tell a client of it, in OpenAI's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias
from uuid import uuid4

if TYPE_CHECKING:
    from server.turn import Delta, ToolDelta

Event: TypeAlias = dict[str, Any]
"""`type` and the type's fields, without the `sequence_number`, which the stream adds."""

Logprobs: TypeAlias = Sequence[dict[str, Any]]
"""Of tokens, in OpenAI's shape."""

Status = Literal["completed", "incomplete"]


class _Item(Protocol):
    """One output item while it grows."""

    def begin(self) -> list[Event]: ...
    def end(self, status: Status) -> list[Event]: ...
    def item(self, status: str) -> dict[str, Any]: ...


class Output:
    """Turns what a turn's reader says into items. One item is open at a time; the next one closes it."""

    def __init__(self) -> None:
        self._done: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def items(self, status: str = "in_progress") -> list[dict[str, Any]]:
        """All items so far; the open one has the status `status`."""
        return self._done if self._open is None else [*self._done, self._open.item(status)]

    def push(self, delta: Delta, logprobs: Sequence[Logprobs] = ()) -> list[Event]:
        """`logprobs`: of each piece of content, none if they are not asked for."""
        told = iter(logprobs)
        events: list[Event] = []
        if delta.reasoning:
            events += self._text(ReasoningText, delta.reasoning, ())
        for part in delta.parts:
            if isinstance(part, str):
                events += self._text(MessageText, part, next(told, ()))
            else:
                events += self._call(part)
        return events

    def finish(self, status: Status, logprobs: Logprobs = ()) -> list[Event]:
        """Closes the open item. A finished answer that has no text and no call is an empty message.

        `logprobs`: of tokens after all text, as EOS; a message that is open takes them.
        """
        events: list[Event] = []
        kinds = {item["type"] for item in self.items()}
        if not kinds or (status == "completed" and kinds == {"reasoning"}):
            events += self._begin(MessageText(self._next_index()))
        if logprobs and isinstance(self._open, MessageText):
            events.append(self._open.delta("", logprobs))
        return events + self._close(status)

    def _next_index(self) -> int:
        return len(self._done) + (self._open is not None)

    def _begin(self, item: _Item) -> list[Event]:
        events = self._close("completed")
        self._open = item
        return events + item.begin()

    def _close(self, status: Status) -> list[Event]:
        if self._open is None:
            return []
        item, self._open = self._open, None
        self._done.append(item.item(status))
        return item.end(status)

    def _text(self, kind: type[ReasoningText | MessageText], text: str, logprobs: Logprobs) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, kind):
            events = self._begin(kind(self._next_index()))
        assert isinstance(self._open, kind)
        return [*events, self._open.delta(text, logprobs)]

    def _call(self, call: ToolDelta) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, FunctionCall) or self._open.call_index != call.index:
            assert call.id is not None and call.name is not None, "the first delta of a call names it"
            events = self._begin(FunctionCall(self._next_index(), call.index, call.id, call.name))
        assert isinstance(self._open, FunctionCall)
        return [*events, self._open.delta(call.arguments)] if call.arguments else events


class _Text:
    """An item with one part that is text: what reasoning and messages have in common."""

    prefix: str
    part_type: str

    def __init__(self, index: int, id: str) -> None:
        self.id = id
        self._where = {"item_id": id, "output_index": index, "content_index": 0}
        self._index = index
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        item = self.item("in_progress") | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": item},
            {"type": "response.content_part.added", **self._where, "part": self._part("", [])},
        ]

    def delta(self, text: str, logprobs: Logprobs) -> Event:
        self._pieces.append(text)
        self._logprobs += logprobs
        return {"type": f"{self.prefix}.delta", **self._where, "delta": text, **self._extra(list(logprobs))}

    def end(self, status: Status) -> list[Event]:
        text = "".join(self._pieces)
        part = self._part(text, self._logprobs)
        done = {"type": f"{self.prefix}.done", **self._where, "text": text, **self._extra(self._logprobs)}
        return [
            done,
            {"type": "response.content_part.done", **self._where, "part": part},
            {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)},
        ]

    def item(self, status: str) -> dict[str, Any]:
        return self._head(status) | {"content": [self._part("".join(self._pieces), self._logprobs)]}

    def _head(self, status: str) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": self.part_type, "text": text, **self._extra(logprobs)}

    def _extra(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {}


class ReasoningText(_Text):
    """What the model thinks, whole: there is no summary, and nothing is encrypted."""

    prefix, part_type = "response.reasoning_text", "reasoning_text"

    def __init__(self, index: int) -> None:
        super().__init__(index, f"rs_{uuid4().hex}")

    def _head(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "status": status, "summary": []}


class MessageText(_Text):
    """What the model says."""

    prefix, part_type = "response.output_text", "output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index, f"msg_{uuid4().hex}")

    def _head(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant"}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return super()._part(text, logprobs) | {"annotations": []}

    def _extra(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": logprobs}


class FunctionCall:
    """A call that the client is to make. `call_index`: which of the turn's calls it is."""

    def __init__(self, index: int, call_index: int, call_id: str, name: str) -> None:
        self.id, self.call_index = f"fc_{uuid4().hex}", call_index
        self._call_id, self._name, self._index = call_id, name, index
        self._where = {"item_id": self.id, "output_index": index}
        self._pieces: list[str] = []

    def begin(self) -> list[Event]:
        item = self.item("in_progress")
        return [{"type": "response.output_item.added", "output_index": self._index, "item": item}]

    def delta(self, arguments: str) -> Event:
        self._pieces.append(arguments)
        return {"type": "response.function_call_arguments.delta", **self._where, "delta": arguments}

    def end(self, status: Status) -> list[Event]:
        item = self.item(status)
        done = {"name": self._name, "arguments": item["arguments"]}
        return [
            {"type": "response.function_call_arguments.done", **self._where, **done},
            {"type": "response.output_item.done", "output_index": self._index, "item": item},
        ]

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
        }
