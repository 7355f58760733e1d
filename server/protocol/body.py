"""A request's bytes to a validated body: size, UTF-8, strict JSON, known fields. Each fault is a 4xx."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from engine.types import InvalidRequest
from server.errors import CLIENT_GONE, ApiError
from server.protocol import strict_json

B = TypeVar("B", bound=BaseModel)


async def read(request: Request, model: type[B], limit: int) -> B:
    """The request's body as `model`. `limit` in bytes. Raises ApiError 413 and InvalidRequest."""
    return validate(model, parse_json(await _read_bytes(request, limit)))


async def _read_bytes(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():  # chunked bodies have no length: count, and read no further
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "the client left before its request was whole") from error
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    message = f"the request body is larger than {limit} bytes"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def parse_json(raw: bytes) -> Any:
    """Strict JSON in UTF-8. Raises InvalidRequest."""
    try:
        return strict_json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error}", code="invalid_json") from error
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
