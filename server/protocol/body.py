"""A request's bytes to a validated body: size, UTF-8, strict JSON, known fields. Each fault is a 4xx."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from engine.types import InvalidRequest
from server.errors import CLIENT_GONE, ApiError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
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
    """JSON as RFC 8259 has it: no NaN, no overflow, no lone surrogates, no name twice in one object."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error}", code="invalid_json") from error
    try:
        data = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_duplicates
        )
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except InvalidRequest:
        raise
    except UnicodeEncodeError as error:
        message = "a string holds a lone surrogate, which is not a character"
        raise InvalidRequest(message, code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("the JSON is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return data


def _no_constant(name: str) -> float:
    raise InvalidRequest(f"{name} is not a JSON number", code="invalid_json")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise InvalidRequest(f"the number {literal[:32]} is out of range", code="invalid_json")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the name {twice!r} comes twice in one object", code="invalid_json")
    return data


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
            return InvalidRequest(f"unknown field '{param}'", param, "unknown_field")
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
