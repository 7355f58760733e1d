"""Finds calls in an answer's text as it comes. The formats differ only in what `Form` says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from server.tools.calls import ToolDelta
from server.tools.json_text import Item, JsonText, Member, Status
from server.tools.text import held_back, rewritten, skip_space

_MEMBERS = ("name", "arguments", "id", "type")


@dataclass(frozen=True)
class Form:
    """How a format writes calls: begin, head, JSON, end; whitespace is free between them.

    `head(text)`: given what follows `begin`, the offset where the JSON starts (-1: no call can follow) and
    the function's name if the head has it; None while that is open. `bare`: the answer may begin with a
    call that has no `begin`, and further ones follow a `separator`.
    """

    begin: str
    end: str = ""
    inner: tuple[str, ...] = ()  # further markers
    arguments: tuple[str, ...] = ("arguments",)  # names of the member that holds them
    lists: bool = False  # the JSON may be a list of calls
    bare: bool = False
    separator: str = ";"
    head: Callable[[str], tuple[int, str | None] | None] | None = None


@dataclass
class _Call:
    """What is known of one call: `end` is None while its arguments go on, `text` if they are rewritten."""

    name: str | None
    start: int = -1
    end: int | None = None
    text: str | None = None

    @property
    def begun(self) -> bool:
        """It can be told: the name is known and the arguments have begun."""
        return self.name is not None and (self.start >= 0 or self.text is not None)


class CallParser:
    """Splits text into content and calls. Any chunking of a text gives the same content and calls.

    A call is told once it is whole; what only looks like one, or names no known function, is content.
    With `sure` (a grammar holds the model to the form) arguments are told while they are written.
    Whitespace before a call, and after the last one, is no content.
    """

    def __init__(
        self,
        form: Form,
        names: Collection[str],
        new_id: Callable[[], str],
        *,
        sure: bool = False,
        only: bool = False,
        begun: bool = False,
    ) -> None:
        """`only`: a grammar has nothing but calls, and what a limit cuts off between or in the head of two
        is no content. `begun`: the answer goes on with a text that is there already."""
        self._form, self._names, self._new_id, self._sure = form, frozenset(names), new_id, sure
        self._only = only
        self._buffer = ""
        self._passed = 0  # characters before the buffer
        self._space = ""  # whitespace that is content only if content follows
        self._begun = begun  # there was content or a call
        self._after = False  # nothing but whitespace since a call
        self._inside: _Unit | None = None
        self._count = 0
        self._told: list[str | ToolDelta] = []
        self.spans: list[tuple[int, int]] = []
        """Of the last push: where each piece of content lies in all of the text, from start to before end."""
        self.cut = False
        """A call was told in part, and then the text broke off."""

    def push(self, text: str, *, final: bool) -> list[str | ToolDelta]:
        """Takes the next piece in; gives, in order, content and deltas that nothing can take back."""
        self._buffer += text
        self._told, self.spans = [], []
        while self._outside(final) if self._inside is None else self._call(self._inside, final):
            pass
        if final and self._space and not self._after:
            self._content(self._space, self._passed)
        if not self._only:
            return self._told
        self.spans = []
        return [each for each in self._told if isinstance(each, ToolDelta)]

    def _outside(self, final: bool) -> bool:
        """Content up to the next call. False: no more to be had from the buffer."""
        buffer, begin = self._buffer, self._form.begin
        if self._form.bare and (not self._begun or self._after):
            at = self._bare_start(buffer)
            if at == len(buffer) and not final:
                return False
            if buffer[at : at + 1] == "{":
                self._inside = _Unit(at)
                return True
        at = buffer.find(begin)
        if at >= 0:
            self._show(self._pass(at))
            self._inside = _Unit(len(begin))
            return True
        kept = 0 if final else held_back(buffer, begin)
        self._show(self._pass(len(buffer) - kept))
        return False

    def _bare_start(self, buffer: str) -> int:
        """Where a call without a begin would start: len(buffer) if that is open yet."""
        at = skip_space(buffer, 0)
        if self._after:
            if not buffer.startswith(self._form.separator, at):
                return at if at == len(buffer) else -1
            at = skip_space(buffer, at + len(self._form.separator))
        return at

    def _pass(self, count: int) -> str:
        """Takes so many characters off the buffer."""
        passed, self._buffer = self._buffer[:count], self._buffer[count:]
        self._passed += count
        return passed

    def _show(self, text: str) -> None:
        """Content that ends where the buffer begins."""
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._content(body, self._passed - len(self._space))
            self._begun, self._after = True, False

    def _content(self, text: str, end: int) -> None:
        self._told.append(text)
        self.spans.append((end - len(text), end))

    def _call(self, unit: _Unit, final: bool) -> bool:
        """Goes on with a call. False: it is not over and the buffer is used up."""
        reader = unit.json or self._find_json(unit)
        if reader is None:
            return self._broken(unit, unit.head) if final or unit.lost else False
        status = reader.feed(self._buffer)
        lost = self._lost_at(unit, reader)
        if self._sure:
            self._tell(unit, reader, lost)
        if lost is not None:
            return self._broken(unit, lost)
        if status is Status.BROKEN or (status is Status.MORE and final):
            return self._broken(unit, reader.position)
        if status is Status.MORE:
            return False
        end = self._end_of(reader.position, final)
        if end is None:
            return False
        if end < 0 or not self._valid(unit, reader):
            return self._broken(unit, reader.position)
        self._tell(unit, reader, None)
        self._close(end)
        return True

    def _find_json(self, unit: _Unit) -> JsonText | None:
        """Sets `unit.json` once it is known where the JSON begins; `unit.lost` if it cannot begin."""
        at = skip_space(self._buffer, unit.head)
        if at == len(self._buffer):
            return None
        if self._form.head is not None and self._buffer[at] != "[":
            found = self._form.head(self._buffer[at:])
            if found is None:
                return None
            offset, unit.name = found
            unit.lost = offset < 0 or unit.name not in self._names
            at += offset
        elif self._buffer[at] not in ("{[" if self._form.lists else "{"):
            unit.lost = True
        if not unit.lost:
            unit.json = JsonText(at)
        return unit.json

    def _lost_at(self, unit: _Unit, reader: JsonText) -> int | None:
        """Where it first shows that these are no calls: a member that calls do not have, or a name."""
        if unit.name is not None:
            return None
        for item in reader.items[unit.checked :]:
            keys: set[str] = set()
            for member in item.members:
                kind = "arguments" if member.key in self._form.arguments else member.key
                if kind in keys or kind not in _MEMBERS:
                    return member.key_end
                keys.add(kind)
                if kind == "name" and member.end is not None and self._name(member) not in self._names:
                    return member.end
            unit.checked += item.end is not None
        return None

    def _name(self, member: Member) -> str | None:
        value = json.loads(self._buffer[member.start : member.end])
        return value if isinstance(value, str) else None

    def _end_of(self, at: int, final: bool) -> int | None:
        """Where the call ends, its end marker included; None if that is open; -1 if other text follows."""
        end = self._form.end
        if not end:
            return at
        at = skip_space(self._buffer, at)
        rest = self._buffer[at : at + len(end)]
        if rest == end:
            return at + len(end)
        if final and not rest:  # the model, or a stop string, ended the answer here
            return at
        if not end.startswith(rest):
            return -1
        return len(self._buffer) if final else None  # `final`: the end was cut short, the call is whole

    def _valid(self, unit: _Unit, reader: JsonText) -> bool:
        calls = [self._read(unit, item) for item in reader.items]
        return bool(calls) and all(call is not None and call.begun for call in calls)

    def _read(self, unit: _Unit, item: Item, lost: int | None = None) -> _Call | None:
        """An item as a call, as far as it has come and not beyond `lost`; None if its arguments are none."""
        if unit.name is not None:
            return _Call(unit.name, item.start, item.end)
        call, arguments = _Call(None), None
        for member in item.members:
            if lost is not None and member.key_end >= lost:
                break
            if member.key == "name" and member.end is not None:
                call.name = self._name(member)
            elif member.key in self._form.arguments:
                arguments = member
        if arguments is not None and arguments.start >= 0 and self._buffer[arguments.start] == "{":
            call.start, call.end = arguments.start, arguments.end
        elif item.end is not None and lost is None:
            call.text = rewritten(self._buffer[arguments.start : arguments.end] if arguments else "null")
            return call if call.text is not None else None
        return call

    def _tell(self, unit: _Unit, reader: JsonText, lost: int | None) -> None:
        """Deltas for what of the unit's calls is known and untold."""
        for number in range(unit.told, len(reader.items)):
            item = reader.items[number]
            if lost is not None and item.start >= lost:
                return
            call = self._read(unit, item, lost)
            if call is None or not call.begun or call.name not in self._names:
                return
            end = reader.position if call.end is None else call.end
            piece = call.text if call.text is not None else self._buffer[max(call.start, unit.sent) : end]
            if unit.current != number:
                unit.current, self._begun, self._after, self._space = number, True, True, ""
                self._told.append(ToolDelta(self._count, self._new_id(), call.name, ""))
                self._count += 1
            if piece:
                self._told.append(ToolDelta(self._count - 1, None, None, piece))
                unit.sent = end
            if item.end is None or (lost is not None and item.end > lost):
                return
            unit.told, unit.rest = number + 1, item.end

    def _close(self, end: int) -> None:
        self._pass(end)
        self._inside = None

    def _broken(self, unit: _Unit, at: int) -> bool:
        """No call, up to `at`: content, but for what has been told already."""
        partly = unit.current >= unit.told
        start = unit.sent if partly else unit.rest
        self.cut = self.cut or partly
        rest = self._buffer[start:at]
        self._close(at)
        self._show(rest)
        return True


class _Unit:
    """A call, or a list of them, being read. Offsets into the parser's buffer."""

    def __init__(self, head: int) -> None:
        self.head = head  # the end of the begin marker
        self.json: JsonText | None = None
        self.lost = False
        self.name: str | None = None  # if the head has it
        self.checked = 0  # items that are whole and look like calls
        self.told = 0  # items told whole
        self.current = -1  # the item that has been told last, in part or whole
        self.sent = 0  # arguments are told up to here
        self.rest = 0  # the end of the last item told whole
