"""Logging, request ids, and the outermost layer of the app: one line and one answer per request."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import log_writer
from server import record
from server.auth import KEY_NAME
from server.errors import REFUSED, REQUEST_ID, to_api_error
from server.log_lines import LogFormat, formatter, quoted
from server.metrics import Metrics
from server.record import Decode, Record

if TYPE_CHECKING:
    from server.spans import Tracing

log = logging.getLogger(__name__)


def configure(level: str, kind: LogFormat = "text") -> None:
    """Logs of this process go to stderr, one line each, with the request's id. Python's warnings too."""
    log_writer.configure(logging.getLevelNamesMapping()[level.upper()], formatter(kind))


def say(text: str, kind: LogFormat) -> None:
    """Tells who started the server, on stderr; where the log is JSON, as its records."""
    if kind == "text":
        print(text, file=sys.stderr)
        return
    for line in text.splitlines():
        log.info("%s", line.strip())


class RequestContext:
    """ASGI middleware, outermost: x-request-id on every answer, 500 for what nobody caught, and what the
    request did, in one line and, if it generates and `tracing` is on, in a span.

    A client's own x-request-id is echoed if it is at most 128 visible ASCII characters. `decode`: token
    ids to text, to log prompts and texts; None: neither is logged.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None, decode: Decode | None = None
    ) -> None:
        self._app, self._metrics, self._tracing, self._decode = app, metrics, tracing, decode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        ident = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid4().hex
        scope[REQUEST_ID] = ident
        told = Record(request_id=ident, method=scope["method"], path=scope["path"])
        token = record.enter(told)
        span = None if self._tracing is None else self._tracing.start(scope, told)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = int(message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = ident
                told.streamed = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)
            if message["type"] == "http.response.body":
                told.whole = not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if told.status:  # the answer has begun: closing the connection is all that is left to say
                told.failed(500, "internal_error")
                raise
            await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            if (refused := scope.get(REFUSED)) is not None:
                told.answered(refused.status, refused.code)
            told.key = scope.get(KEY_NAME)
            # the route's template, never the raw path: labels must be bounded
            told.end(getattr(scope.get("route"), "path", "unmatched"))
            self._metrics.http_requests.labels(told.route, str(told.status)).inc()
            if self._tracing is not None and span is not None:
                self._tracing.end(span, told)
            self._log(told)
            record.leave(token)

    def _log(self, told: Record) -> None:
        fields: dict[str, Any] = told.figures()
        if self._decode is not None:
            fields |= told.content(self._decode)
        what = (quoted(told.method), quoted(fields["path"]), told.status)
        log.info("%s %s %d", *what, extra={"fields": fields})
