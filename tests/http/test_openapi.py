"""The OpenAPI page: complete, described, true. Its examples run and what they give fits its schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import events_of, running
from pydantic import BaseModel, SecretStr

from server.protocol.answers import (
    CompletionAnswer,
    CompletionChunk,
    DetokenizeAnswer,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelList,
    PolicyList,
    Ready,
    TokenizeAnswer,
    Version,
)
from server.protocol.answers_chat import ChatAnswer, ChatChunk
from server.protocol.examples import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from server.protocol.responses_answer import ResponsesAnswer, ResponsesEvent
from server.protocol.responses_examples import RESPONSES

Ids = Callable[[str], list[int]]
GENERATE = {
    "/v1/completions": (CompletionAnswer, CompletionChunk),
    "/v1/chat/completions": (ChatAnswer, ChatChunk),
    "/v1/responses": (ResponsesAnswer, ResponsesEvent),
}
READ = {
    "/v1/models": ModelList,
    "/v1/models/tiny": ModelCard,
    "/v1/policies": PolicyList,
    "/health": Health,
    "/ready": Ready,
    "/version": Version,
}
OPEN = {"/health", "/ready", "/version", "/metrics"}


@pytest.fixture
def page(make_app: Callable[..., FastAPI]) -> dict[str, Any]:
    return make_app().openapi()


def operations(page: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def fits(model: type[BaseModel], text: str) -> None:
    """Raises ValidationError for a field that the model lacks, or that has another type."""
    model.model_validate_json(text, strict=True)
    for name, value in json.loads(text).items():
        may = getattr(model, "missing_or_null", frozenset())
        field = model.model_fields.get(name)
        assert value is not None or field is None or field.is_required() or name in may, name


def test_every_route_is_on_it(page: dict[str, Any]) -> None:
    reads = {"/v1/models", "/v1/models/{model_id}", "/v1/policies"}
    assert set(page["paths"]) == {*GENERATE, *reads, *OPEN, "/tokenize", "/detokenize"}


def test_every_operation_says_what_it_answers(page: dict[str, Any]) -> None:
    for path, method, operation in operations(page):
        assert operation["description"] and operation["tags"], path
        answers = operation["responses"]
        assert "200" in answers and "500" in answers and "422" not in answers, path
        assert all(answer["content"] and answer["headers"] for answer in answers.values()), path
        for status, answer in answers.items():
            if status != "200":
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
        if method == "post":
            assert {"400", "404", "413", "500", "503"} <= set(answers), path
            assert operation["requestBody"]["content"]["application/json"]["examples"], path
        if path in GENERATE:
            assert "text/event-stream" in answers["200"]["content"]


def test_every_field_of_a_request_is_described(page: dict[str, Any]) -> None:
    schemas = page["components"]["schemas"]
    seen: set[str] = set()
    left = [
        operation["requestBody"]["content"]["application/json"]["schema"]
        for _, method, operation in operations(page)
        if method == "post"
    ]
    while left:
        for name in {
            part.split('"')[0] for part in json.dumps(left.pop()).split("#/components/schemas/")[1:]
        }:
            if name not in seen:
                seen.add(name)
                left.append(schemas[name])
    assert {"CompletionBody", "ChatBody", "Speculation", "StructuredOutputs", "Message"} <= seen
    for name in seen:
        schema = schemas[name]
        if schema.get("type") != "object":
            continue
        assert schema["additionalProperties"] is False, name
        for field, about in schema["properties"].items():
            assert about.get("description") or '"const"' in json.dumps(about), f"{name}.{field}"
            null = {"type": "null"} in about.get("anyOf", [])
            assert null or field in schema.get("required", []), f"{name}.{field} may be null"


def test_content_parts_list_all_that_they_take(page: dict[str, Any]) -> None:
    for name in ("Message", "MessageItem", "FunctionCallOutputItem", "ReasoningItem"):
        fields = page["components"]["schemas"][name]["properties"]
        text = json.dumps([fields.get(field, {}) for field in ("content", "output", "summary")])
        assert 0 < text.count('"type": "object"') == text.count('"additionalProperties": false'), name


def test_references_resolve(page: dict[str, Any]) -> None:
    for kind in ("schemas", "headers"):
        named = set(page["components"][kind])
        refs = {part.split('"')[0] for part in json.dumps(page).split(f"#/components/{kind}/")[1:]}
        assert refs == named  # and nothing lies about unused


async def test_keys(make_app: Callable[..., FastAPI], page: dict[str, Any]) -> None:
    assert "securitySchemes" not in page["components"]
    assert not any("401" in operation["responses"] for _, _, operation in operations(page))
    locked = make_app(api_key=[SecretStr("one")]).openapi()
    assert locked["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, _, operation in operations(locked):
        assert (path in OPEN) == ("401" not in operation["responses"]) == ("security" not in operation)


@pytest.fixture
async def two_names(make_app: Callable[..., FastAPI], engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    engine.make_room(512)
    async with running(make_app(served_model_name=["tiny", "other"])) as client:
        yield client


EXAMPLES = [
    (path, name)
    for path, examples in (
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", RESPONSES),
        ("/tokenize", TOKENIZE),
        ("/detokenize", DETOKENIZE),
    )
    for name in examples
]


@pytest.mark.parametrize(("path", "name"), EXAMPLES)
async def test_examples_run(two_names: httpx.AsyncClient, path: str, name: str) -> None:
    page = (await two_names.get("/openapi.json")).json()
    examples = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
    example = next(each["value"] for each in examples.values() if each["summary"] == name)
    assert example["model"] == "tiny"
    response = await two_names.post(path, json=example)
    assert response.status_code == 200, response.text
    if example.get("stream"):
        for event in events_of(response):
            if event != "[DONE]":
                fits(GENERATE[path][1], json.dumps(event))
    elif path in GENERATE:
        fits(GENERATE[path][0], response.text)
    else:
        fits(TokenizeAnswer if path == "/tokenize" else DetokenizeAnswer, response.text)


RICH: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ["hello", "one"], "n": 2, "logprobs": 3, "echo": True, "stop": "is"}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": "hello", "prompt_logprobs": 2, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "hello", "best_of": 3, "n": 2, "bad_words": ["stop"]}),
    ("/v1/chat/completions", {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("/v1/chat/completions", {"prompt_logprobs": 1, "max_tokens": 3}),
]


@pytest.mark.parametrize(("path", "fields"), RICH)
async def test_rich_answers_fit(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> None:
    body = {"model": "tiny"} | fields
    if path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": "hello"}]
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    fits(GENERATE[path][0], response.text)
    if "prompt_logprobs" in fields or "best_of" in fields:
        return
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}, {}):
        stream = {"stream": True, "stream_options": options} if options else {"stream": True}
        *chunks, done = events_of(await client.post(path, json=body | stream))
        assert done == "[DONE]"
        for chunk in chunks:
            fits(GENERATE[path][1], json.dumps(chunk))
            assert ("usage" in chunk) == bool(options)


@pytest.mark.parametrize(("path", "model"), READ.items())
async def test_what_is_read_fits(client: httpx.AsyncClient, path: str, model: type[BaseModel]) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    fits(model, response.text)


async def test_errors_fit(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"model": "tiny", "prompt": "hello"}
    wrong = [{"n": 0}, {"model": "x"}, {"prompt": ["a" * 30_000]}]
    engine.fail_after = 1
    for fields, status in zip([*wrong, {}], (400, 404, 413, 500), strict=True):
        response = await client.post("/v1/completions", json=body | fields)
        assert response.status_code == status
        fits(ErrorAnswer, response.text)
    *_, last = events_of(await client.post("/v1/completions", json=body | {"stream": True}))
    fits(ErrorAnswer, json.dumps(last))
