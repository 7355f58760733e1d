"""A request's bytes to a validated body: size, UTF-8, strict JSON, known fields. Each fault is a 4xx."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from engine.types import InvalidRequest
from server import admission
from server.admission import Ticket
from server.errors import CLIENT_GONE, ApiError
from server.protocol import strict_json

B = TypeVar("B", bound=BaseModel)

_LARGE = 2**16
"""Bytes of a body above which a thread reads it: seconds of one client's are not taken from all others."""
_THREAD = ThreadPoolExecutor(1, "bodies")


class Limits(Protocol):
    """Of one body, as `Settings` has them."""

    @property
    def max_body_bytes(self) -> int: ...
    @property
    def max_body_objects(self) -> int: ...


async def read(request: Request, model: type[B], limits: Limits) -> B:
    """The request's body as `model`. Raises ApiError 413, 429 if there is no room for it, and InvalidRequest.

    Its place in the queue is taken here, once it has come whole: who sends slowly holds none.
    """
    ticket = admission.current()
    try:
        raw = await _read_bytes(request, limits.max_body_bytes, ticket)
        ticket.reserve()

        def understood() -> B:
            return validate(model, parse_json(raw, limits.max_body_objects))

        if len(raw) <= _LARGE:
            return understood()
        return await asyncio.get_running_loop().run_in_executor(_THREAD, understood)
    finally:
        ticket.release_body()


async def _read_bytes(request: Request, limit: int, ticket: Ticket) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise _too_large(f"is larger than {limit} bytes")
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():  # chunked bodies have no length: count, and read no further
            size += len(part)
            if size > limit:
                raise _too_large(f"is larger than {limit} bytes")
            if size > _LARGE:
                ticket.hold(size)
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "the client left before its request was whole") from error
    return b"".join(parts)


def _too_large(what: str) -> ApiError:
    headers = {"Connection": "close"}
    return ApiError(413, f"the request body {what}", code="request_too_large", headers=headers)


def parse_json(raw: bytes, objects: int) -> Any:
    """Strict JSON in UTF-8, of so many objects and arrays at most. Raises InvalidRequest and ApiError 413."""
    try:
        return strict_json.loads(raw.decode("utf-8"), objects)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error}", code="invalid_json") from error
    except strict_json.TooMany as error:
        raise _too_large(f"holds more than {objects} objects and arrays, or names in one of them") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error


def validate(model: type[B], data: Any) -> B:
    """`data` as `model`. Raises InvalidRequest that names the first field at fault."""
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _readable(error) from error


def _readable(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"]) or None
    cause = first.get("ctx", {}).get("error")
    match first["type"]:
        case "extra_forbidden":
            return InvalidRequest(f"unknown field '{param or ''}'", param, "unknown_field")
        case "missing":
            return InvalidRequest(f"the field '{param}' is required", param, "missing_field")
        case "model_type" | "dict_type":
            return InvalidRequest(f"'{param}' must be an object", param, "invalid_value")
        case _ if isinstance(cause, InvalidRequest):
            inner = cause.param.split(".") if cause.param else []  # as the nested object names it
            return InvalidRequest(cause.message, _path((*first["loc"], *inner)) or None, cause.code)
        case _:
            return InvalidRequest(f"'{param}': {first['msg']}", param, "invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:  # a nested object's own path may begin with an index
            path += part if part.startswith("[") else f".{part}"
    return path.removeprefix(".")
