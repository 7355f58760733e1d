"""Logging, request ids, and the outermost layer of the app: one line and one answer per request."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import to_api_error
from server.metrics import Metrics

log = logging.getLogger(__name__)
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


class _AddRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure(level: str) -> None:
    """Logs of this process go to stderr, one line each, with the request's id."""
    handler = logging.StreamHandler()
    handler.addFilter(_AddRequestId())
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class RequestContext:
    """ASGI middleware, outermost: x-request-id on every answer, 500 for what nobody caught, access log.

    A client's own x-request-id is echoed if it is at most 128 visible ASCII characters.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        ident = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid4().hex
        token = request_id.set(ident)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = ident
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # the answer has begun: closing the connection is all that is left to say
                raise
            await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            self._report(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        # the route's template, never the raw path: labels must be bounded
        template = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.http_requests.labels(template, str(status)).inc()
        log.info("%s %s %d %.1f ms", scope["method"], _one_line(scope["path"]), status, seconds * 1000)


def _one_line(text: str) -> str:
    """Without characters that a client could forge lines of a log with."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
