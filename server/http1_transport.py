"""A connection's socket: its bounds, and a close that does not take the answer back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

_SEND_BYTES = 2**17  # that the kernel keeps for a client to read; Linux takes twice that


class Unhurried:
    """A transport. Told to close for the first time it asks `sees_to_end`: True if that will close it later.

    Closed upon unread input, a socket is reset, and what was sent may be lost on the client.
    """

    def __init__(self, transport: asyncio.Transport, sees_to_end: Callable[[], bool]) -> None:
        self._transport, self._sees_to_end = transport, sees_to_end
        self._closing = False

    def close(self) -> None:
        if self._closing or not self._sees_to_end():
            self._transport.close()
        self._closing = True

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def bound(transport: asyncio.Transport, write_seconds: float) -> None:
    """A client that vanished without a word is noticed: while it is silent, and while it should read.
    And the kernel keeps only so much for one that reads slowly."""
    peer: socket.socket | None = transport.get_extra_info("socket")
    if peer is None or peer.family not in (socket.AF_INET, socket.AF_INET6):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    linux = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
    for name, value in (linux | {"TCP_USER_TIMEOUT": int(write_seconds * 1000)}).items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
