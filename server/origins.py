"""Web pages of other sites: where no key is asked for, a browser must not let them use the server."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, to_api_error

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class OwnOrigin:
    """ASGI middleware: 403 for what a page of another origin makes its reader's browser ask for.

    Browsers name a page's origin with every POST, and send some (text/plain, forms) without asking first.
    A name that points at this machine's loopback, and is not its own, is another site's, too (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS or self._may(scope):
            return await self._app(scope, receive, send)
        message = "a web page of another origin may not use this server; --cors-origin allows one"
        await to_api_error(ApiError(403, message, code="origin_not_allowed")).response()(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:  # no browser, or a page's own address that a person typed
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        if origin in self._allowed:
            return True
        own = origin.partition("://")[2] == headers.get("host", "")
        server = scope.get("server")
        return own and (server is None or not _loopback(server[0]) or _local(origin))


def _loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return False


def _local(origin: str) -> bool:
    """A page that came from an address, or from this machine by its fixed name: no DNS had a say."""
    try:
        host = urlsplit(origin).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
