"""Functions that a model may call, and calls as a client is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function. `parameters`: the JSON schema of its arguments, an object; None: it takes none.

    `source`: the tool as the client wrote it, which is how templates are given it.
    """

    name: str
    parameters: dict[str, Any] | None
    strict: bool
    source: dict[str, Any]


@dataclass(frozen=True)
class ToolDelta:
    """A piece of call number `index`. `id` and `name` come with the call's first delta only."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass
class ToolCall:
    """A whole call. `arguments`: JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}
