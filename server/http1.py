"""The HTTP server: uvicorn, with this project's protocol, limits and end."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from server.context import Context
from server.http1_protocol import Limits, Protocol
from server.http1_tls import behind_tls

LATE_SECONDS = 10  # for answers to say that they end, once they have been told to


class Server(uvicorn.Server):
    """uvicorn with the app. At the end open answers may go on for `shutdown_seconds`; then `late` is called,
    which fails what still runs, so that each of them ends with an error that says so.
    """

    def __init__(
        self,
        app: FastAPI,
        shutdown_seconds: float,
        late: Callable[[], Awaitable[None]],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(_config(app, shutdown_seconds, tls))
        self._seconds, self._late = shutdown_seconds, late

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def wait() -> None:
            await asyncio.sleep(self._seconds)
            await self._late()

        waiting = asyncio.create_task(wait())
        try:
            await super().shutdown(sockets)
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def protocol(
    context: Context, tls: ssl.SSLContext | None = None, connections: int | None = None
) -> type[asyncio.Protocol]:
    """What makes connections with the server's clocks and bounds, which hold for handshakes, too.

    `connections` at most; None: as many as the settings say.
    """
    settings = context.settings
    most = settings.max_connections if connections is None else connections
    limits = Limits(settings.read_seconds, settings.write_seconds, most, settings.max_body_bytes)
    made = partial(Protocol, count=context.metrics.http_requests, limits=limits)
    return cast("type[asyncio.Protocol]", made if tls is None else behind_tls(tls, limits, made))


def _config(app: FastAPI, shutdown_seconds: float, tls: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol(app.state.context, tls),
        ws="none",
        lifespan="on",
        log_config=None,  # server.logs has the say
        log_level="warning",  # start and end are told by server.launch
        access_log=False,  # the app logs its requests itself
        server_header=False,
        timeout_graceful_shutdown=int(shutdown_seconds) + LATE_SECONDS,
    )
