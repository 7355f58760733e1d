"""One connection: uvicorn's h11 protocol with clocks, bounds, and its faults in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, cast
from uuid import uuid4

import h11
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import REFUSED, REQUEST_ID, RETRY_AFTER_SECONDS, ApiError, unavailable
from server.http1_checks import Connection
from server.http1_transport import Unhurried, bound

log = logging.getLogger(__name__)

_LINGER_SECONDS = 1.0  # without a word
_GRACE_SECONDS = 0.1
_SLOWEST = 1000  # bytes a second that a body must come at, once its first seconds are over
_PROBE_SECONDS = (0.05, 0.5)  # between looks at a client that has ended its side: at first, and at most
_CODES = {
    408: "request_timeout",
    413: "request_too_large",
    414: "uri_too_long",
    417: "expectation_failed",
    431: "headers_too_large",
    505: "http_version_not_supported",
}
# what uvicorn warns of is the client's doing, once for each request: only its errors are ours
_uvicorn_log = logging.getLogger("uvicorn.error.http1")
_uvicorn_log.setLevel(logging.ERROR)


_TOLD = 16  # connections, and a tenth: over the bound, and open until they are told so


def most_open(connections: int) -> int:
    """Sockets that a bound of so many connections may take."""
    return connections + _TOLD + connections // 10


def fitting(sockets: int) -> int:
    """The largest bound that takes no more than so many sockets; one at least."""
    return max(1, (sockets - _TOLD) * 10 // 11)


@dataclass(frozen=True)
class Limits:
    """What one client may take. `read_seconds`: for a request's headers, and again for its body, which has
    a second more for each `_SLOWEST` bytes; `write_seconds`: in which it must read something of its answer.
    """

    read_seconds: float
    write_seconds: float
    connections: int
    body_bytes: int

    def far_over(self, connections: int) -> bool:
        """Whether so many are open that there is no room even to say so."""
        return connections > most_open(self.connections)


class Protocol(H11Protocol):
    """One connection. What is not HTTP is answered as every error is, and the connection is closed."""

    def __init__(self, *args: Any, count: Counter, limits: Limits, **kwargs: Any) -> None:
        """`count`: of answers, by route and status; those that no route gives are counted here."""
        super().__init__(*args, **kwargs)
        self.conn: Connection = Connection(limits.body_bytes)
        self._count, self._limits = count, limits
        self.logger = _uvicorn_log
        self._refused = False  # nothing more is heard
        self._heard = self._until = 0.0  # then: when it last sent something, until when it may
        self._ended = False  # the client has ended its side, and is still to be answered
        self._waits_for: Literal["headers", "body"] | None = None
        self._since, self._bytes = 0.0, 0  # of what it waits for: when it began, what has come of it
        self._graced = False
        self._read_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        self._closing_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Unhurried(transport, self._sees_to_end)))
        bound(transport, self._limits.write_seconds)
        if self._limits.far_over(len(self.connections)):
            transport.abort()
        elif len(self.connections) > self._limits.connections:
            again = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            message = "too many connections are open"
            self._refuse(ApiError(503, message, code="too_many_connections", headers=again))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._read_clock, self._write_clock, self._closing_clock):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._heard = self.loop.time()
            return
        self._bytes += len(data)
        super().data_received(data)
        self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client may end its side and still listen. What it asked for whole is answered, if it is there."""
        cycle = self.cycle
        if self._refused or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        old = self.conn.their_http_version == b"1.0"  # no way to ask it
        if self.scheme == "https" or (old and not cycle.response_started):  # TLS ends both sides at once
            return False
        self._ended = True
        self.loop.call_later(_PROBE_SECONDS[0], self._probe)
        return True

    def _probe(self) -> None:
        """Sends what changes nothing for a client that listens; one that is gone answers it with a reset."""
        if self.transport.is_closing():
            return
        probe: h11.Event
        if self.cycle.response_started:
            probe = h11.Data(data=b":\n\n" if self.conn.tells_events else b"")
        else:
            probe = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
        self.transport.write(self.conn.send(probe))
        self._look(_PROBE_SECONDS[0])

    def _look(self, again: float) -> None:
        """asyncio does not read any more, so a reset must be looked for."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(again, self._look, min(2 * again, _PROBE_SECONDS[1]))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ended and self.cycle.response_complete:  # and no other request had come before the end
            self.transport.close()
        self._bound_closing()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._bound_closing()

    def pause_writing(self) -> None:
        """More is to be sent than the client takes: it must go on reading."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_clock is not None:
            self._write_clock.cancel()

    def _await_reading(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._write_clock = self.loop.call_later(self._limits.write_seconds, self._unread, size)

    def _unread(self, size: int) -> None:
        if self.transport.get_write_buffer_size() < size:
            self._await_reading()
            return
        log.info("a client that reads nothing is given up")
        self.transport.abort()

    def _bound_closing(self) -> None:
        """What is closing sends what it has, but not for ever."""
        unsent = self.transport.is_closing() and self.transport.get_write_buffer_size()
        if unsent and self._closing_clock is None:
            self._closing_clock = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def _watch(self) -> None:
        """Starts the clock when headers or a body are waited for, and ends it when they came."""
        waits_for: Literal["headers", "body"] | None = None
        if self._refused or self._ended or self.transport.is_closing():
            pass
        elif self.conn.their_state is h11.SEND_BODY:
            waits_for = "body"
        elif self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            waits_for = "headers"  # between requests the keep-alive's clock runs
        if waits_for == self._waits_for:
            return
        self._waits_for = waits_for
        if self._read_clock is not None:
            self._read_clock.cancel()
        if waits_for is not None:
            self._since, self._bytes, self._graced = self.loop.time(), 0, False
            self._read_clock = self.loop.call_later(self._limits.read_seconds, self._late)

    def _late(self) -> None:
        now = self.loop.time()
        if self.flow.read_paused:  # it is the server that does not read
            self._since, self._bytes = now, 0
        left = self._since + self._limits.read_seconds + self._bytes / _SLOWEST - now
        if left <= 0 and not self._graced:  # the loop may have been late itself, and not have read what came
            self._graced, left = True, _GRACE_SECONDS
        if left > 0:
            self._read_clock = self.loop.call_later(left, self._late)
        elif self._waits_for == "headers" and not self.conn.trailing_data[0]:
            self.conn.send(h11.ConnectionClosed())
            self.transport.close()  # it has asked for nothing
        else:
            what = f"the request's {self._waits_for} did not come whole in time"
            self._refuse(ApiError(408, what, code=_CODES[408]))

    def shutdown(self) -> None:
        """At the server's end: a request that has not come whole is not waited for."""
        cycle = self.cycle
        if self._refused:
            self._until = min(self._until, self.loop.time() + _LINGER_SECONDS)
            return
        if cycle is None or cycle.response_complete or not cycle.more_body or cycle.response_started:
            super().shutdown()
            self._bound_closing()
            return
        self._refuse(unavailable("the server is shutting down"))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error, which says more than `msg`."""
        error = _api_error(sys.exception())
        log.info("a request that is not HTTP: %d", error.status)  # and nothing of what it said
        self._refuse(error)

    def _refuse(self, error: ApiError) -> None:
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            self._answer(error)
        self._leave()

    def _answer(self, error: ApiError) -> None:
        response = error.response()
        ident = uuid4().hex
        if self.cycle is None or self.cycle.response_complete:
            self._count.labels("unmatched", str(error.status)).inc()
        else:  # the app logs and counts what it has of it
            scope: MutableMapping[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope[REFUSED], ident = error, scope.get(REQUEST_ID, ident)
        own = [(b"connection", b"close"), (b"x-request-id", ident.encode())]
        head = h11.Response(
            status_code=error.status,
            headers=[*self.server_state.default_headers, *response.raw_headers, *own],
            reason=HTTPStatus(error.status).phrase,
        )
        bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.conn.method == b"HEAD"
        body = h11.Data(data=b"" if bodiless else bytes(response.body))
        for event in (head, body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _leave(self) -> None:
        """Ends our side, and the other once the client sends no more, or has sent for long enough."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # for the app the client has left
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._heard = self.loop.time()
        self._until = self._heard + self._limits.read_seconds
        self._end()

    def _end(self) -> None:
        at = min(self._heard + _LINGER_SECONDS, self._until)
        if at > self.loop.time():
            self.loop.call_at(at, self._end)
            return
        self.transport.close()
        self._bound_closing()

    def _sees_to_end(self) -> bool:
        """Of a request that was answered before it came whole, the rest is read."""
        if self._refused or self.conn.their_state is not h11.SEND_BODY:
            return False
        self._refused = True
        self._leave()
        return True


def _api_error(error: BaseException | None) -> ApiError:
    status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
    if status == 431:
        return ApiError(431, "the request's line and headers are too long", code=_CODES[431])
    if status not in _CODES:
        status = 400
    message = f"the request is not valid HTTP/1.1: {str(error)[:200]}"
    return ApiError(status, message, code=_CODES.get(status, "invalid_http"))
