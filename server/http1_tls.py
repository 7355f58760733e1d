"""TLS before HTTP: a handshake has the clock of a request's headers, and counts as a connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from uvicorn.server import ServerState

from server.http1_protocol import Limits, Protocol


class Handshake(asyncio.Protocol):
    """One connection until its TLS stands; then a `Protocol` has it.

    asyncio's own servers tell of a connection only after its handshake: till then nothing would count it.
    """

    def __init__(
        self, make: Callable[[], Protocol], limits: Limits, tls: ssl.SSLContext, state: ServerState
    ) -> None:
        self._make, self._limits, self._tls, self._open = make, limits, tls, state.connections
        self._early = b""  # what came in the handshake's last bytes
        self._ended = self._lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.pause_reading()  # until TLS reads
        self._open.add(self)  # type: ignore[arg-type]  # uvicorn's own ask only for shutdown()
        if self._limits.far_over(len(self._open)):
            self.shutdown()
        self._shaking = asyncio.get_running_loop().create_task(self._shake())

    def data_received(self, data: bytes) -> None:
        self._early += data

    def eof_received(self) -> bool:
        self._ended = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def shutdown(self) -> None:
        """The server ends: nothing has been asked for."""
        self.transport.abort()

    async def _shake(self) -> None:
        loop, seconds = asyncio.get_running_loop(), self._limits.read_seconds
        transport: asyncio.Transport | None = None
        try:
            if not self.transport.is_closing():
                transport = await loop.start_tls(
                    self.transport, self, self._tls, server_side=True, ssl_handshake_timeout=seconds
                )
        except OSError:  # what is no TLS, or left; it was closed
            pass
        finally:
            self._open.discard(self)
        if transport is None or transport.is_closing() or self._ended or self._lost:
            self.transport.abort()
            return
        protocol = self._make()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._early:
            protocol.data_received(self._early)


def behind_tls(tls: ssl.SSLContext, limits: Limits, make: Callable[..., Protocol]) -> Callable[..., Any]:
    """What uvicorn makes connections with, if `make` makes those that need no handshake."""

    def made(*, server_state: ServerState, **given: Any) -> Handshake:
        return Handshake(lambda: make(server_state=server_state, **given), limits, tls, server_state)

    return made
