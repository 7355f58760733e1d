"""API keys: every route but those that an orchestrator asks needs one, if any is set."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, to_api_error

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})


class KeyAuth:
    """ASGI middleware: answers 401 before the body is read. Without keys it lets everyone in."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app, self._open = app, open_paths
        # digests have one length, so that comparing them tells nothing of the key's
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or not self._digests:
            return await self._app(scope, receive, send)
        header = Headers(scope=scope).get("authorization")
        if header is not None and self._known(header):
            return await self._app(scope, receive, send)
        message = "incorrect API key" if header else "missing API key: send 'Authorization: Bearer KEY'"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await to_api_error(error).response()(scope, receive, send)

    def _known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip())
        # every key is compared, so that the time does not tell which one came close
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
