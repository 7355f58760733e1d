"""The OpenAPI page: bodies, answers, streams, errors, examples and keys of every route.

Routes read their bodies and write their answers by themselves, so FastAPI must be told of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.auth import OPEN_PATHS
from server.protocol.answers import CompletionChunk, ErrorAnswer
from server.protocol.answers_chat import ChatChunk
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.responses import ResponsesBody
from server.protocol.responses_answer import ResponsesEvent
from server.protocol.tokens import DetokenizeBody, TokenizeBody

_REF = "#/components/schemas/{model}"
_MODELS: tuple[type[BaseModel], ...] = (
    ErrorAnswer,
    CompletionBody,
    CompletionChunk,
    ChatBody,
    ChatChunk,
    ResponsesBody,
    ResponsesEvent,
    TokenizeBody,
    DetokenizeBody,
)
ERRORS = {
    400: "The request cannot be served as asked: `param` names the field, `message` its bounds",
    401: "No key, or not one of the server's",
    404: "No model of this name",
    413: "The body is larger than the server's `max_body_bytes`, or has more than `max_body_objects`",
    429: "The queue is full, or the key has taken its share; `Retry-After` says when to ask again",
    500: "A fault of the server, or `request_failed`: the engine gave up this request",
    503: "The engine loads, restarts or is dead, or the server ends; `Retry-After` says when to ask again",
    504: "The request's time, its own `timeout` or the server's, was over before its answer was whole",
}
_READS = (400, 404, 413, 429, 500, 503)
"""Errors of a route that reads a body and asks the engine."""


def documented(
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    *,
    chunk: type[BaseModel] | None = None,
    done: bool = True,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    errors: tuple[int, ...] = _READS,
) -> dict[str, Any]:
    """What a route's decorator is given besides its path.

    `chunk`: the data of one event, if it streams; `done`: a last event says [DONE]. `examples` by their
    summaries, without the model's name.
    `errors`: statuses; 401 is added where keys are set.
    """
    responses: dict[str, Any] = {str(status): _error(status) for status in errors}
    if chunk is not None:  # it generates
        responses["504"] = _error(504)
        responses["200"] = {"content": {"text/event-stream": {"itemSchema": _event(chunk, done)}}}
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = _request(body, examples or {})
    whole = {} if answer is None else {200: {"model": answer}}
    return {"response_model": None, "responses": whole, "openapi_extra": extra}


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=ErrorAnswer.__name__)}
    return {"description": ERRORS[status], "content": {"application/json": {"schema": schema}}}


def _request(model: type[BaseModel], examples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    if examples:
        content["examples"] = {
            summary.replace(" ", "-"): {"summary": summary, "value": dict(value)}
            for summary, value in examples.items()
        }
    return {"required": True, "content": {"application/json": content}}


def _event(chunk: type[BaseModel], done: bool) -> dict[str, Any]:
    """An event of a stream, as OpenAPI 3.2 describes them: its data is JSON, or the word [DONE]."""
    kinds = [{"$ref": _REF.format(model=kind.__name__)} for kind in (chunk, ErrorAnswer)]
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": kinds} if done else kinds[0],
    }
    if done:
        data = {
            "anyOf": [{"const": "[DONE]"}, data],
            "description": "chunks, then `[DONE]`; after an error its body, and no `[DONE]`",
        }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def install(app: FastAPI, *, model: str, keys: bool) -> None:
    """Gives the app its page. `model`: the name that examples use. `keys`: whether the API needs one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(
                title=app.title, version=app.version, description=_ABOUT, routes=app.routes, tags=_TAGS
            )
            _, schemas = models_json_schema([(each, "validation") for each in _MODELS], ref_template=_REF)
            components = page.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            components["headers"] = _HEADERS
            for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's; see `_finish`
                components["schemas"].pop(unused, None)
            for path, operations in page["paths"].items():
                for operation in operations.values():
                    _finish(operation, model, keys and path not in OPEN_PATHS)
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _finish(operation: dict[str, Any], model: str, locked: bool) -> None:
    """What only the app knows: the model's name in examples, the need of a key; headers of every answer."""
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own; faults of a request are 400 here
    if locked:
        operation["security"] = [{"key": []}]
        responses["401"] = _error(401)
    for status, response in responses.items():
        names = ("x-request-id", "Retry-After") if status in ("429", "503") else ("x-request-id",)
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        for example in content.get("examples", {}).values():
            example["value"] = {"model": model} | copy.deepcopy(example["value"])
    operation["responses"] = dict(sorted(responses.items()))


_ABOUT = (
    "OpenAI's API over a target model whose tokens are drafted by a small one; the text is the target's. "
    "Fields that are not listed are refused by name; null is a field's default."
)
_TAGS = [
    {"name": "generation", "description": "Text from prompts and conversations"},
    {"name": "tokens", "description": "Text to token ids and back"},
    {"name": "models", "description": "What is served, and how it may speculate"},
    {"name": "operations", "description": "For those who run the server; no key is needed"},
]
_HEADERS = {
    "x-request-id": {
        "description": "the request's own, or one made here",
        "required": True,
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "seconds", "required": True, "schema": {"type": "string"}},
}
