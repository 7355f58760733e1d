"""What goes from a front to a replica: one HTTP request, whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Message, Scope

REPLICA_HEADER = "x-disco-replica"
"""On every answer of a replica: its id."""

_CARRIED = ("method", "path", "raw_path", "query_string", "headers", "http_version", "scheme", "root_path")
_ADDRESSES = ("client", "server")  # tuples, where there is one


@dataclass(frozen=True)
class Call:
    """`scope`: what may cross processes of the ASGI scope. `affinity`: see `affinity.affinity_key`."""

    scope: dict[str, Any]
    body: bytes
    affinity: str | None


class Answers(Protocol):
    """A replica's answer on its way: first an empty list, when a replica has taken the call, then ASGI
    messages, as many at a time as there are."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    async def __anext__(self) -> list[Message]: ...

    def cancel(self) -> None:
        """Ends the work on the answer. Idempotent; a no-op once it is whole."""
        ...


Submit = Callable[[Call], Answers]


def portable(scope: Scope) -> dict[str, Any]:
    """The part of a scope that a replica's app needs."""
    kept = {name: scope[name] for name in _CARRIED if name in scope}
    kept["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    for name in _ADDRESSES:
        if scope.get(name) is not None:
            kept[name] = tuple(scope[name])
    return kept


def restored(call: Call) -> Scope:
    """The scope of a call, for an app."""
    return {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "state": {}, **call.scope}
