"""Errors as OpenAI's body: {"error": {"message", "type", "param", "code"}}, every key present."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine.types import EngineUnavailable, InvalidRequest, RequestFailed
from server.record import CLIENT_GONE as CLIENT_GONE
from server.record import current

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
LONGEST_RETRY_AFTER_SECONDS = 60
REQUEST_ID = "disco_request_id"
"""The scope's entry for the request's id."""
REFUSED = "disco_refused"
"""The scope's entry for the ApiError that the connection answered, before the app had, in its place."""
_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer that is an error. `status` is the HTTP status, the rest is OpenAI's body. `reason`: of one
    that was not let in, for the metrics.
    """

    reason: str = ""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unavailable(message: str) -> ApiError:
    """503 with Retry-After: the engine is loading, restarting or dead."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, code="engine_unavailable", headers=headers)


def shutting_down(why: str = "it takes no more requests") -> ApiError:
    """503 with Retry-After: the server ends, others may be there. The connection is not used again."""
    error = unavailable(f"the server is shutting down: {why}")
    error.headers["Connection"] = "close"
    error.reason = "draining"
    return error


def too_many(
    message: str, reason: str, code: str, seconds: float, headers: Mapping[str, str] | None = None
) -> ApiError:
    """429 with Retry-After: `seconds`, as a whole number that is not too long."""
    wait = min(max(1, math.ceil(seconds)), LONGEST_RETRY_AFTER_SECONDS)
    error = ApiError(429, message, code=code, headers={"Retry-After": str(wait), **(headers or {})})
    error.reason = reason
    return error


def deadline_passed() -> ApiError:
    """504: the request was not answered by the time that it, or the server, gives it."""
    return ApiError(504, "the time for this request is over", "timeout", "deadline_exceeded")


def to_api_error(error: Exception) -> ApiError:
    """Whose fault it is, as a status. What is not known is ours: 500, logged, and no detail shown.

    The client is told of it: the request's record has it.
    """
    told = _api_error(error)
    current().failed(told.status, told.code)
    return told


def _api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, error.param, error.code)
        case EngineUnavailable():
            return unavailable(str(error) or "the engine is not available")
        case RequestFailed():
            return ApiError(500, str(error) or "the engine gave up this request", code="request_failed")
        case HTTPException():
            return _http_error(error)
        case _:
            log.error("unexpected error", exc_info=error)
            return ApiError(500, "internal server error", code="internal_error")


def _http_error(error: HTTPException) -> ApiError:
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "_")
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":  # and where GET is, HEAD is
        headers["Allow"] = "GET, HEAD"
    return ApiError(status, str(error.detail), code=code, headers=headers)


def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code == 404:
        asked = f"{request.method[:32]} {request.scope['path'][:256]}"
        error = ApiError(404, f"no route {asked}", code="not_found")
    return to_api_error(error).response()


def install(app: FastAPI) -> None:
    """Every error that a route raises is answered in OpenAI's shape.

    Errors that are not listed here pass to `RequestContext`, which answers 500 with a request id.
    """
    for kind in (ApiError, InvalidRequest, EngineUnavailable, RequestFailed, HTTPException):
        app.add_exception_handler(kind, _answer)
