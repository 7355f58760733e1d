"""Strict JSON that comes in pieces: where a value ends, where it breaks, and where its members are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # what a string holds without a further look
_SPACE = re.compile(r"[ \t\n\r]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_DEPTH = 128
"""Deeper nesting is taken for broken: no function's arguments are made like that."""


class Status(Enum):
    MORE = "more"
    DONE = "done"
    BROKEN = "broken"


class _Expect(Enum):
    VALUE = 0
    ITEM_OR_END = 1
    KEY = 2
    KEY_OR_END = 3
    COLON = 4
    COMMA_OR_END = 5
    STRING = 6
    ESCAPE = 7
    HEX = 8
    WORD = 9  # a number, true, false or null


@dataclass
class Member:
    """A member of an item. Offsets of its value in the text; `end` is None while the value goes on."""

    key: str  # as written, between the quotes
    key_end: int
    start: int = -1  # -1: the value has not begun
    end: int | None = None


@dataclass
class Item:
    """The object itself, or one of the list's. Offsets as in `Member`."""

    start: int
    end: int | None = None
    members: list[Member] = field(default_factory=list)


class JsonText:
    """Follows one JSON object, or one list of objects, through a text that only grows.

    `feed(text)` goes on where it stopped and looks at each character once. `position` is then the end
    of the value (DONE), the first character that is not JSON (BROKEN) or the end of the text (MORE).
    """

    def __init__(self, start: int) -> None:
        self.position = start
        self.status = Status.MORE
        self.items: list[Item] = []
        self._open: list[str] = []
        self._expect = _Expect.VALUE
        self._mark = start  # where the current string or word began
        self._is_key = False
        self._hex = 0

    def feed(self, text: str) -> Status:
        """`text`: all of it, from its first character on."""
        while self.status is Status.MORE and self.position < len(text):
            at = self.position
            if not self._step(text):
                self.status, self.position = Status.BROKEN, at
        return self.status

    def _step(self, text: str) -> bool:
        """Takes one character, or a run of them that needs no look. False: not JSON."""
        at, char = self.position, text[self.position]
        match self._expect:
            case _Expect.STRING:
                return self._string(text, at, char)
            case _Expect.ESCAPE:
                self._expect, self._hex = (_Expect.HEX, 4) if char == "u" else (_Expect.STRING, 0)
                self.position += 1
                return char in '"\\/bfnrtu'
            case _Expect.HEX:
                self._hex -= 1
                self._expect = _Expect.HEX if self._hex else _Expect.STRING
                self.position += 1
                return char in "0123456789abcdefABCDEF"
            case _Expect.WORD:
                return self._word(text, at, char)
        if (space := _SPACE.match(text, at)) is not None:
            self.position = space.end()
            return True
        return self._structure(at, char)

    def _string(self, text: str, at: int, char: str) -> bool:
        if (plain := _PLAIN.match(text, at)) is not None:
            self.position = plain.end()
            return True
        self.position += 1
        if char == "\\":
            self._expect = _Expect.ESCAPE
            return True
        if char != '"':
            return False  # a raw control character
        if self._is_key:
            self._expect = _Expect.COLON
            if self._at_top:
                self.items[-1].members.append(Member(text[self._mark + 1 : at], at + 1))
        else:
            self._ended(at + 1)
        return True

    def _word(self, text: str, at: int, char: str) -> bool:
        if char.isalnum() or char in "+-.":
            self.position += 1
            return at - self._mark < 64
        word = text[self._mark : at]
        self._ended(at)  # and the character itself is looked at again
        return word in ("true", "false", "null") or _NUMBER.fullmatch(word) is not None

    def _structure(self, at: int, char: str) -> bool:
        expect = self._expect
        self.position += 1
        if expect is _Expect.COLON:
            self._expect = _Expect.VALUE
            return char == ":"
        if expect is _Expect.COMMA_OR_END and char == ",":
            self._expect = _Expect.KEY if self._open[-1] == "{" else _Expect.VALUE
            return True
        if char in "]}":
            return self._close(at, char)
        if expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect, self._mark, self._is_key = _Expect.STRING, at, True
            return char == '"'
        if expect in (_Expect.VALUE, _Expect.ITEM_OR_END):
            return self._value(at, char)
        return False

    def _value(self, at: int, char: str) -> bool:
        if not self._open or self._open == ["["]:  # the value itself, or an item of the list
            if char != "{" and (self._open or char != "["):
                return False
            if char == "{":
                self.items.append(Item(at))
        elif self._at_top:
            self.items[-1].members[-1].start = at
        if char in "{[":
            self._open.append(char)
            self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.ITEM_OR_END
            return len(self._open) <= _DEPTH
        self._mark, self._is_key = at, False
        self._expect = _Expect.STRING if char == '"' else _Expect.WORD
        return char in '"-tfn0123456789'

    def _close(self, at: int, char: str) -> bool:
        ends = _Expect.KEY_OR_END if char == "}" else _Expect.ITEM_OR_END
        if self._expect not in (ends, _Expect.COMMA_OR_END) or self._open[-1] != "{["[char == "]"]:
            return False
        self._open.pop()
        self._ended(at + 1)
        return True

    def _ended(self, end: int) -> None:
        """A value has ended at `end`."""
        self._expect = _Expect.COMMA_OR_END
        if self._at_top:
            self.items[-1].members[-1].end = end
        elif self._open == ["["] or not self._open:
            if self.items and self.items[-1].end is None:
                self.items[-1].end = end
            if not self._open:
                self.status = Status.DONE

    @property
    def _at_top(self) -> bool:
        """Inside an object that is the value itself or an item of the list, and not deeper."""
        return self._open in (["{"], ["[", "{"])
