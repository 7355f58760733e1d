"""API keys: every route but those that an orchestrator asks needs one, if any is set."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, to_api_error
from server.keys import KeyRing

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
KEY_NAME = "disco_key_name"
"""The scope's entry for the name of the key that a request came with; missing where none is needed."""


class KeyAuth:
    """ASGI middleware: answers 401 before the body is read. A ring without keys lets everyone in."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app, self._keys, self._open = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or not self._keys.locked:
            return await self._app(scope, receive, send)
        header = Headers(scope=scope).get("authorization")
        name = None if header is None else self._name(header)
        if name is not None:
            scope[KEY_NAME] = name
            return await self._app(scope, receive, send)
        message = "incorrect API key" if header else "missing API key: send 'Authorization: Bearer KEY'"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await to_api_error(error).response()(scope, receive, send)

    def _name(self, header: str) -> str | None:
        scheme, _, key = header.partition(" ")
        name = self._keys.name_of(key.strip())
        return name if scheme.lower() == "bearer" else None
