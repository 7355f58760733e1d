"""Compiled grammars on their way into the engine: asked for where they are missing, read beside its steps.

Reading a large one takes more than a second, in which no row would move on. A thread does it, one grammar
at a time and the smallest first; xgrammar lets go of the GIL meanwhile.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from engine.messages import Add
from engine.types import CompiledGrammar, InvalidRequest


class Shelf(Protocol):
    """Where grammars are kept once they are read."""

    def read(self, data: bytes) -> Any:
        """On any thread. Raises InvalidRequest."""
        ...

    def keep(self, key: str, compiled: Any) -> None:
        """On the engine's thread alone."""
        ...


class Unread(Exception):
    """The engine has not, or no more, the grammar of this key: it is to be read, then the request added."""

    def __init__(self, shelf: Shelf, key: str) -> None:
        super().__init__(key)
        self.shelf, self.key = shelf, key


class Reading:
    """The requests that wait for their grammars. All but the reading is on the engine's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Add]] = {}  # by key
        self._come: dict[str, bytes] = {}  # of some of these keys, not begun
        self._under_way: tuple[str, Shelf, Future[Any]] | None = None
        self._shelf: Shelf | None = None
        self._thread = ThreadPoolExecutor(1, "grammars")

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    def wait_for(self, unread: Unread, request: Add) -> bool:
        """Puts the request aside; whether its grammar is to be asked for."""
        others = self._waiting.setdefault(unread.key, [])
        others.append(request)
        self._shelf = unread.shelf
        asked = len(others) > 1 or (self._under_way is not None and self._under_way[0] == unread.key)
        return not asked

    def take(self, grammar: CompiledGrammar) -> None:
        """What was asked for; nothing is done with it if nobody waits any more."""
        under_way = self._under_way is not None and self._under_way[0] == grammar.key
        if grammar.key in self._waiting and not under_way:
            self._come[grammar.key] = grammar.data
            self._go_on()

    def leave(self, ticket: int) -> None:
        """Whoever waits under this ticket waits no longer."""
        for key, waiting in self._waiting.items():
            left = [each for each in waiting if each.ticket != ticket]
            if len(left) < len(waiting):
                self._waiting[key] = left
                if not left:
                    del self._waiting[key]
                    self._come.pop(key, None)
                return

    def finished(self, seconds: float) -> tuple[list[Add], InvalidRequest | None]:
        """Whose grammar has been read, and why it could not be; waits `seconds` for one under way."""
        if self._under_way is None:
            return [], None
        key, shelf, reading = self._under_way
        if not wait([reading], seconds).done:
            return [], None
        error = None
        try:
            shelf.keep(key, reading.result())
        except InvalidRequest as refused:
            error = refused
        self._under_way = None
        self._go_on()
        return self._waiting.pop(key, []), error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        if self._come and self._under_way is None:
            assert self._shelf is not None
            key = min(self._come, key=lambda each: len(self._come[each]))
            reading = self._thread.submit(self._shelf.read, self._come.pop(key))
            self._under_way = key, self._shelf, reading
