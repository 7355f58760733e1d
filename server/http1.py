"""HTTP/1.1 as the server speaks it: uvicorn on h11, and its faults of the protocol in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from uuid import uuid4

import h11
import uvicorn
from fastapi import FastAPI
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError, unavailable

log = logging.getLogger(__name__)

_LINGER_SECONDS = 1.0
LATE_SECONDS = 10  # for answers to say that they end, once they have been told to
# what uvicorn warns of is the client's doing, once for each request: only its errors are ours
_uvicorn_log = logging.getLogger("uvicorn.error.http1")
_uvicorn_log.setLevel(logging.ERROR)


class Server(uvicorn.Server):
    """uvicorn with the app. At the end open answers may go on for `shutdown_seconds`; then `late` is called,
    which fails what still runs, so that each of them ends with an error that says so.
    """

    def __init__(self, app: FastAPI, shutdown_seconds: float, late: Callable[[], Awaitable[None]]) -> None:
        super().__init__(_config(app, shutdown_seconds))
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


def _config(app: FastAPI, shutdown_seconds: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(Protocol, count=app.state.context.metrics.http_requests)),
        ws="none",
        lifespan="on",
        log_config=None,  # server.logs has the say
        log_level="warning",  # start and end are told by server.launch
        access_log=False,  # the app logs its requests itself
        timeout_graceful_shutdown=int(shutdown_seconds) + LATE_SECONDS,
    )


class Protocol(H11Protocol):
    """One connection. What is not HTTP is answered as every error is, and the connection is closed."""

    def __init__(self, *args: Any, count: Counter, **kwargs: Any) -> None:
        """`count`: of answers, by route and status; those that no route gives are counted here."""
        super().__init__(*args, **kwargs)
        self._count = count
        self.logger = _uvicorn_log
        self._refused = False

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def shutdown(self) -> None:
        """At the server's end: a request that has not come whole is not waited for."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.more_body or cycle.response_started:
            super().shutdown()
            return
        self._refused = True
        self._answer(unavailable("the server is shutting down"))
        self._leave()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error, which says more than `msg`."""
        error = _api_error(sys.exception())
        log.info("a request that is not HTTP: %d", error.status)  # and nothing of what it said
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            self._answer(error)
        self._leave()

    def _answer(self, error: ApiError) -> None:
        response = error.response()
        if self.cycle is None or self.cycle.response_complete:  # else the app counts what it has of it
            self._count.labels("unmatched", str(error.status)).inc()
        own = [(b"connection", b"close"), (b"x-request-id", uuid4().hex.encode())]
        head = h11.Response(
            status_code=error.status,
            headers=[*self.server_state.default_headers, *response.raw_headers, *own],
            reason=HTTPStatus(error.status).phrase,
        )
        bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        body = h11.Data(data=b"" if bodiless else bytes(response.body))
        for event in (head, body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _leave(self) -> None:
        """Ends our side, and the other a little later: closed upon unread input, a socket would take the
        answer back."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # for the app the client has left
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _api_error(error: BaseException | None) -> ApiError:
    if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
        return ApiError(431, "the request's line and headers are too long", code="headers_too_large")
    return ApiError(400, f"the request is not valid HTTP/1.1: {str(error)[:200]}", code="invalid_http")
