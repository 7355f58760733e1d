"""What the server and the process that compiles grammars say to each other."""

from __future__ import annotations

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """Compile this. `kind` and `text` are those of a `Structure`.

    `own`: a structural tag is the client's own; the places of faults in its schemas begin at the tag.
    """

    kind: str
    text: str
    own: bool = True


class Answer(msgspec.Struct, frozen=True):
    """The compiled grammar, or why there is none. `grown`: the process holds much memory since."""

    data: bytes = b""
    refused: str | None = None
    grown: bool = False
