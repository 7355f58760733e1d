"""Every bad request is a 4xx in OpenAI's shape, and nothing of it reaches the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
from pydantic import SecretStr

from server.protocol import strict_json

GOOD = {"model": "tiny", "prompt": "hello"}
USER = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": USER}

BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["hello", ""]}, "prompt", "empty"),
    ({"prompt": 5}, "prompt", "token ids"),
    ({"prompt": [1, "a"]}, "prompt", "only"),
    ({"prompt": [1, True]}, "prompt", "only"),
    ({"prompt": [270]}, "prompt", "270"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [10**30]}, "prompt", "out of range"),
    ({"prompt": ["hello"] * 2049}, "prompt", "2048"),
    ({"n": 0}, "n", "1"),
    ({"n": 10000}, "n", "128"),
    ({"n": "2"}, "n", "integer"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"best_of": 0}, "best_of", "n"),
    ({"best_of": 21}, "best_of", "20"),
    ({"best_of": 2, "n": 3}, "best_of", "n"),
    ({"best_of": 2, "stream": True}, "best_of", "stream"),
    ({"max_tokens": -1}, "max_tokens", "0"),
    ({"temperature": -1}, "temperature", "0"),
    ({"temperature": 2.1}, "temperature", "2"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 2}, "top_p", "1"),
    ({"top_p": -0.1}, "top_p", "0"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "1"),
    ({"presence_penalty": 3}, "presence_penalty", "2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"logprobs": 6}, "logprobs", "5"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"logit_bias": {"270": 1}}, "logit_bias", "270"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"seed": 2**63}, "seed", "less"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a", ""]}, "stop", "empty"),
    ({"stop": list("abcde")}, "stop", "4"),
    ({"stop": 5}, "stop", "string"),
    ({"stop_token_ids": [270]}, "stop_token_ids", "270"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "integer"),
    ({"min_tokens": 17}, "min_tokens", "max_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"fooo": 1}, "fooo", "unknown"),
    ({"tools": []}, "tools", "unknown"),
    ({"sampling_method": "magic"}, "sampling_method", "coupled"),
    ({"speculation": {"policy": "magic"}}, "speculation.policy", "static"),
    ({"speculation": {"policy": "static", "options": {"foo": 1}}}, "speculation.options.foo", "sl"),
    ({"speculation": {"policy": "static", "options": {"sl": "x"}}}, "speculation.options.sl", "sl"),
    ({"speculation": {"drafter": "magic"}}, "speculation.drafter", "ngram"),
    ({"speculation": {"max_sl": -1}}, "speculation.max_sl", "0"),
    ({"speculation": {"foo": 1}}, "speculation.foo", "unknown"),
    ({"speculation": 3}, "speculation", "object"),
]

BAD_CHAT: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "1"),
    ({"messages": "hello"}, "messages", "list"),
    ({"messages": None}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "system"),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role", "function"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo", "unknown"),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {}}]},
        "messages[0].function_call",
        "not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "text"),
    ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "no forbidden words"),
    ({"tools": [{}]}, "tools[0].type", "required"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"functions": []}, "functions", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "text"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "exclude"),
    ({"continue_final_message": True}, "continue_final_message", "assistant"),
    ({"suffix": "x"}, "suffix", "unknown"),
]


def check_error(response: httpx.Response, status: int, kind: str = "invalid_request_error") -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == kind
    assert response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize(("fields", "param", "word"), BAD_COMPLETIONS)
async def test_bad_completions(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, word: str
) -> None:
    response = await client.post("/v1/completions", json=GOOD | fields)
    error = check_error(response, 400)
    assert error["param"] == param and word in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(("fields", "param", "word"), BAD_CHAT)
async def test_bad_chat(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, word: str
) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    error = check_error(response, 400)
    assert error["param"] == param and word in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"model": "tiny",}', "JSON"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "range"),
        (b'{"logit_bias": {"5": NaN}}', "NaN"),
        (b'{"speculation": {"options": {"threshold": [Infinity]}}}', "Infinity"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b"[" * 5000 + b"]" * 5000, "nested"),
        (b'{"x": ' * 201, "nested"),
        (b"[" * 201 + b'"' + b'\\"' * 9000, "nested"),
        (b"[]" * 201, "JSON"),
        (b"[" + b'"[",' * 300 + b"1]", "object"),
        (b'{"n": ' + b"9" * 5000 + b"}", "JSON"),
    ],
    ids=str,
)
async def test_bad_json(client: httpx.AsyncClient, path: str, raw: bytes, word: str) -> None:
    error = check_error(await client.post(path, content=raw), 400)
    assert word in error["message"]


def test_a_name_twice_among_many_is_found_at_once() -> None:
    names = ",".join(f'"{i}": 0' for i in range(200_000))
    with pytest.raises(ValueError, match="'199999' comes twice"):
        strict_json.loads("{" + names + ', "199999": 0}', objects=10**6)


async def test_surrogate_pairs_are_characters(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    raw = b'{"model": "tiny", "prompt": "\\ud83d\\ude00", "echo": true, "max_tokens": 1}'
    response = await client.post("/v1/completions", content=raw)
    assert response.json()["choices"][0]["text"].startswith("😀")


async def test_context_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": [5] * 90, "max_tokens": 7}),
        ("/v1/completions", {"prompt": [5] * 97, "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]}),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 96}),
    ):
        response = await client.post(path, json={"model": "tiny", "stream": True} | fields)
        error = check_error(response, 400)
        assert error["code"] == "context_length_exceeded" and "96" in error["message"]
    assert engine.requests == []
    response = await client.post("/v1/completions", json=GOOD | {"prompt": [5] * 90, "max_tokens": 6})
    assert response.status_code == 200


async def test_one_bad_prompt_of_several_starts_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/v1/completions", json=GOOD | {"prompt": [[5], [6], [999]], "n": 2})
    check_error(response, 400)
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_unknown_model(client: httpx.AsyncClient, path: str) -> None:
    body = (GOOD if path == "/v1/completions" else CHAT) | {"model": "gpt-9"}
    error = check_error(await client.post(path, json=body), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


async def test_unknown_path_and_method(client: httpx.AsyncClient) -> None:
    check_error(await client.get("/v1/nothing"), 404)
    check_error(await client.get("/v1/models/nothing"), 404)
    response = await client.get("/v1/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


async def test_body_over_the_limit(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b"x" * 20_001)
    assert check_error(response, 413)["code"] == "request_too_large"


async def test_chunked_body_over_the_limit_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    response = await client.post("/v1/completions", content=chunks())
    check_error(response, 413)
    assert sent <= 22_000


async def test_keys(make_app: Callable[..., FastAPI], engine: FakeEngine) -> None:
    async with running(make_app(api_key=[SecretStr("one"), SecretStr("two")])) as client:
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"},
                        {"authorization": "one"}, {"authorization": "Bearer "}):  # fmt: skip
            for path in ("/v1/completions", "/v1/nothing"):
                response = await client.post(path, json=GOOD, headers=headers)
                assert check_error(response, 401)["code"] == "invalid_api_key"
            response = await client.get("/v1/models", headers=headers)
            check_error(response, 401)
        assert engine.requests == []
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for key in ("one", "two"):
            response = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200


async def test_request_id_is_echoed_or_made(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=GOOD, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    response = await client.post("/v1/completions", content=b"{", headers={"x-request-id": "mine-2"})
    assert response.headers["x-request-id"] == "mine-2"
    made = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    response = await client.get("/health", headers={"x-request-id": "x" * 129})
    assert response.headers["x-request-id"] != "x" * 129


async def test_openapi_page_resolves(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    names = set(page["components"]["schemas"])
    refs = {part.split('"')[0] for part in json.dumps(page).split("#/components/schemas/")[1:]}
    assert {"CompletionBody", "ChatBody"} <= refs <= names
