"""The server's end over real sockets: who is late is told so, and nobody is waited for who says nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening
from test_bad_input import GOOD, check_error

LONG = GOOD | {"max_tokens": 60}


async def test_answers_that_outlive_the_grace_end_with_an_error(
    make_app: Callable[..., FastAPI], engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.stall_after = 4
    async with httpx.AsyncClient() as client:
        async with listening(make_app(shutdown_seconds=0.3), shutdown_seconds=0.3) as port:
            url = f"http://127.0.0.1:{port}/v1/completions"
            whole = asyncio.create_task(client.post(url, json=LONG))
            await engine.stalled.wait()
            request = client.build_request("POST", url, json=LONG | {"stream": True})
            stream = await client.send(request, stream=True)
        text = (await stream.aread()).decode()
        response = await whole
    check_error(response, 503, "service_unavailable_error")
    assert json.loads(text.split("data: ")[-1])["error"]["code"] == "engine_unavailable"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.mark.parametrize("body", [b"", b"{"], ids=["nothing of its body", "half its body"])
async def test_a_request_that_has_not_come_whole_is_not_waited_for(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: tiny\r\ncontent-length: 1000\r\n\r\n"
    async with asyncio.timeout(10):
        async with listening(make_app()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            await asyncio.sleep(0.1)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"engine_unavailable" in answer
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text
