"""Bodies that hold much: what is not read, and that a large one is read as a small one is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
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
