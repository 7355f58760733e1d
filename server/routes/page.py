"""The live page at `/`: plain files that use the public API. They need no key; what they ask for does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from server.errors import ApiError

router = APIRouter(include_in_schema=False)

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # nothing from elsewhere, nothing inline, nothing sent elsewhere, in nobody's frame
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # kept, but asked for: no old page beside a new API
}


@dataclass(frozen=True)
class _File:
    data: bytes
    media_type: str
    etag: str


def _read() -> dict[str, _File]:
    """By name. The tag is the content's, so that all replicas of a server agree on it."""
    read = {each.name: each.read_bytes() for each in files("server").joinpath("page").iterdir()}
    return {
        name: _File(data, _TYPES[name.rpartition(".")[2]], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
        for name, data in read.items()
    }


_FILES = _read()
PATHS = frozenset({"/", *(f"/page/{name}" for name in _FILES if name != "index.html")})
"""What needs no key."""


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, _FILES["index.html"])


@router.get("/page/{name}")
async def part(request: Request, name: str) -> Response:
    """A file that it is made of."""
    if f"/page/{name}" not in PATHS:
        raise ApiError(404, f"the page has no file '{name}'", code="not_found")
    return _answer(request, _FILES[name])


def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)
