"""Bodies that hold much: what is not read, and that a large one is read as a small one is."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from pydantic import ValidationError
from test_bad_input import GOOD, check_error

from server.bounds import MOST_OBJECTS
from server.protocol.completions import CompletionBody


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize(
    "raw",
    [b'{"x": [' + b"[]," * MOST_OBJECTS + b"1]}", b"{%s}" % b",".join(b'"%d": 1' % i for i in range(99_999))],
)
async def test_what_holds_too_much_is_not_read(
    make_app: Callable[..., FastAPI], path: str, raw: bytes
) -> None:
    """To build it, and to say what is wrong with each, takes seconds."""
    async with running(make_app(max_body_bytes=10**7)) as client:
        error = check_error(await client.post(path, content=raw), 413)
    assert error["code"] == "request_too_large" and str(MOST_OBJECTS) in error["message"]


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_token_ids", "bad_words"])
async def test_of_many_errors_one_is_looked_for(make_app: Callable[..., FastAPI], field: str) -> None:
    body = GOOD | {field: [None] * 1000}
    with pytest.raises(ValidationError) as error:
        CompletionBody.model_validate(body)
    assert error.value.error_count() == 1
    async with running(make_app()) as client:
        assert f"{field}[0]" in check_error(await client.post("/v1/completions", json=body), 400)["message"]


async def test_a_large_body_is_read_as_a_small_one_is(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    async with running(make_app(max_body_bytes=10**6)) as client:
        small = (await client.post("/v1/completions", json=GOOD)).json()
        padded = json.dumps(GOOD).encode() + b" " * 100_000
        large = (await client.post("/v1/completions", content=padded)).json()
        bad = await client.post("/v1/completions", content=padded.replace(b"{", b'{"nonsense": 1, ', 1))
    assert large["choices"] == small["choices"]
    assert check_error(bad, 400)["code"] == "unknown_field"


async def test_a_list_of_tokens_is_read_once_for_all_choices(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    """Copied and checked for each of many choices, one of the whole vocabulary would hold up all others."""
    body = GOOD | {"allowed_token_ids": [*range(270)], "n": 3}
    async with running(make_app()) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    first, *others = [request.params.allowed_token_ids for request in engine.requests]
    assert first is not None and len(first.bits) == 34
    assert len(others) == 2 and all(each is first for each in others)


def sends_first(port: int, size: int) -> tuple[int, dict[str, Any], str | None]:
    """A client that reads nothing before its whole body is sent, as most of the simple ones."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("POST", "/v1/completions", b" " * size, {"content-type": "application/json"})
    answer = client.getresponse()
    told = answer.status, json.loads(answer.read()), answer.headers["connection"]
    client.close()
    return told


async def test_a_client_that_sends_all_before_it_reads_is_told(make_app: Callable[..., FastAPI]) -> None:
    """Closed upon what it still sends, its socket would take the answer back."""
    async with listening(make_app(max_body_bytes=1000)) as port:
        for _ in range(3):
            status, error, connection = await asyncio.to_thread(sends_first, port, 30_000_000)
            assert (status, connection) == (413, "close")
            assert error["error"]["code"] == "request_too_large"


async def test_a_client_that_never_ends_sending_is_left(make_app: Callable[..., FastAPI]) -> None:
    async with listening(make_app(max_body_bytes=1000, read_seconds=2.0)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 999999999\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(30):
                while True:
                    writer.write(b" " * 1000)
                    await writer.drain()
                    await asyncio.sleep(0.01)
        writer.close()
