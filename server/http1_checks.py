"""What h11 lets pass and this server does not: framing that two readers may read differently, versions that
are not spoken, targets and sizes out of bounds."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import h11

LONGEST_TARGET = 8192  # bytes of a request's path and query
LARGEST_HEADERS = 16384  # bytes of all header lines
_EMPTY_LINE = b"\r\n"


class Connection(h11.Connection):
    """One connection of a server. `next_event` raises RemoteProtocolError, with a status hint, for these too.

    `largest_chunk` in bytes: a chunk that says it is larger is refused before it comes.
    """

    def __init__(self, largest_chunk: int) -> None:
        super().__init__(h11.SERVER, LARGEST_HEADERS)
        self._largest_chunk = largest_chunk
        self.method = b""  # of the last request
        self.tells_events = False  # whether the answer being sent is a stream of server-sent events

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            rest, ended = self.trailing_data
            if rest == _EMPTY_LINE[:1] and not ended:
                return h11.NEED_DATA
            # Some clients send it behind a body; RFC 9112, 2.2 asks to ignore it. No public name: the buffer.
            if rest.startswith(_EMPTY_LINE):
                self._receive_buffer.maybe_extract_at_most(len(_EMPTY_LINE))
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.method = event.method
            _check(event)
            return _with_path(event)
        # no public name: how much of the present chunk is still to come
        if getattr(self._reader, "_bytes_in_chunk", 0) > self._largest_chunk:
            raise h11.RemoteProtocolError("a chunk is larger than any body may be", error_status_hint=413)
        return event

    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response):
            types = [value for name, value in event.headers if name == b"content-type"]
            self.tells_events = any(value.startswith(b"text/event-stream") for value in types)
        return super().send(event)


def _check(request: h11.Request) -> None:
    major, _, minor = request.http_version.partition(b".")
    if major != b"1":
        raise h11.RemoteProtocolError("HTTP/1.1 is spoken here, and HTTP/1.0", error_status_hint=505)
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        if minor == b"0":
            raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
    expected = [value.strip().lower() for name, value in request.headers if name == b"expect"]
    if any(value != b"100-continue" for value in expected):
        raise h11.RemoteProtocolError("nothing but 'Expect: 100-continue' is met", error_status_hint=417)
    if len(request.target) > LONGEST_TARGET:
        raise h11.RemoteProtocolError("the target is too long", error_status_hint=414)
    if sum(len(name) + len(value) + 4 for name, value in request.headers) > LARGEST_HEADERS:
        raise h11.RemoteProtocolError("the headers are too long", error_status_hint=431)


def _with_path(request: h11.Request) -> h11.Request:
    """The same request; where its target is a URL, as proxies are told, with the URL's path and query."""
    target = request.target
    if target.startswith(b"/") or (target == b"*" and request.method == b"OPTIONS"):
        return request
    try:
        url = urlsplit(target.decode("ascii"))
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.netloc:
        raise h11.RemoteProtocolError("the target is neither a path nor a URL")
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    return h11.Request(
        method=request.method,
        target=path.encode("ascii"),
        headers=list(request.headers),
        http_version=request.http_version,
    )
