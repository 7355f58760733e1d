"""Reasoning apart from the answer, for templates with think tags."""

from __future__ import annotations

from enum import Enum

from server.tools.text import held_back

BEGIN, END = "<think>", "</think>"


class Place(Enum):
    """Where an answer begins, and where the reader of one is."""

    START = "start"  # the answer may open the tag
    OPENED = "opened"  # inside the tags, nothing said yet
    THINKING = "thinking"
    CLOSED = "closed"  # after the tags, nothing said yet
    ANSWER = "answer"


def thinks(chat_template: str) -> bool:
    """Whether models of this template write think tags."""
    return END in chat_template


def place_after(prompt: str) -> Place:
    """Where the answer to a prompt begins: some templates open the tags, or close them, themselves."""
    said = prompt.rstrip()
    if said.endswith(BEGIN):
        return Place.OPENED
    return Place.CLOSED if said.endswith(END) else Place.START


def place_within(text: str) -> Place:
    """Where an answer goes on that has `text` already."""
    if not text.strip():
        return Place.START
    return Place.THINKING if text.rfind(BEGIN) > text.rfind(END) else Place.ANSWER


class ThinkSplitter:
    """Splits an answer at its think tags; the same for any chunking. Thinking comes first or not at all.

    Whitespace next to a tag belongs to neither side. Without an end tag all is reasoning.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._doubled = place is Place.OPENED  # a model may open the tag once more
        self._buffer = ""
        self._taken = 0
        self.end: int | None = None if place in (Place.OPENED, Place.THINKING) else 0
        """Characters that belong to the reasoning, tags included; None while it goes on."""

    def push(self, text: str, *, final: bool) -> tuple[str, str]:
        """Takes the next piece in; gives reasoning and text of the answer."""
        self._buffer += text
        self._taken += len(text)
        if self._place is Place.START:
            self._start(final)
        if self._place is Place.OPENED:
            self._opened(final)
        reasoning = self._thinking(final) if self._place is Place.THINKING else ""
        if self._place is Place.CLOSED and (body := self._buffer.lstrip()):
            self._place, self._buffer = Place.ANSWER, body
        if self._place is not Place.ANSWER:
            return reasoning, ""
        answer, self._buffer = self._buffer, ""
        return reasoning, answer

    def _start(self, final: bool) -> None:
        body = self._buffer.lstrip()
        if body.startswith(BEGIN):
            self._place, self._buffer, self.end = Place.OPENED, body[len(BEGIN) :], None
        elif final or not BEGIN.startswith(body):
            self._place = Place.ANSWER

    def _opened(self, final: bool) -> None:
        body = self._buffer.lstrip()
        if self._doubled and BEGIN.startswith(body) and body != BEGIN and not final:
            return
        if self._doubled and body.startswith(BEGIN):
            self._doubled = False
            body = body[len(BEGIN) :].lstrip()
        self._buffer = body
        if body:
            self._place = Place.THINKING

    def _thinking(self, final: bool) -> str:
        at = self._buffer.find(END)
        if at >= 0:
            piece, rest = self._buffer[:at].rstrip(), self._buffer[at + len(END) :]
            self._place, self._buffer, self.end = Place.CLOSED, rest, self._taken - len(rest)
            return piece
        if final:
            piece, self._buffer = self._buffer, ""
            return piece
        kept = held_back(self._buffer, END)
        piece = self._buffer[: len(self._buffer) - kept].rstrip()
        self._buffer = self._buffer[len(piece) :]
        return piece
