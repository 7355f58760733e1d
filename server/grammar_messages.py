"""What the server and the processes that compile grammars say to each other."""

from __future__ import annotations

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """Compile this. `kind` and `text` are those of a `Structure`; "ready" compiles nothing.

    `own`: a structural tag is the client's own; the places of faults in its schemas begin at the tag.
    `seconds`, after which nobody waits any more, and `memory`, bytes that compiling may take.
    """

    kind: str
    text: str
    own: bool = True
    seconds: float = 60.0
    memory: int = 1 << 30


class Answer(msgspec.Struct, frozen=True):
    """The compiled grammar, or why there is none. `beyond`: it takes more than it was given, for one."""

    data: bytes = b""
    refused: str | None = None
    beyond: bool = False
