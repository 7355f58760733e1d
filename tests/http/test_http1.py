"""What is not HTTP, over a raw socket: an error as every other, and nothing of it in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from http_support import listening
from pydantic import SecretStr
from test_bad_input import GOOD, check_error

POST = b"POST /v1/completions HTTP/1.1\r\nhost: tiny\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
FORGED = b"GET /\x1b[31m HTTP/1.1\r\nINFO forged: line\r\n\r\n"
BAD = {
    "no request": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "forged lines": FORGED,
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "no colon": b"GET /health HTTP/1.1\r\nhost: tiny\r\nnonsense\r\n\r\n",
    "a zero byte": b"GET /health HTTP/1.1\r\nhost: tiny\r\na: \x00\r\n\r\n",
    "no length": POST + b"content-length: many\r\n\r\n",
    "a length below zero": POST + b"content-length: -1\r\n\r\n",
    "two lengths": POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
    "an endless length": POST + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
    "an unknown coding": POST + b"transfer-encoding: gzip\r\n\r\n",
    "a bad chunk": CHUNKED + b"zz\r\nhello\r\n",
    "a bad end of a chunk": CHUNKED + b"2\r\n{}}}0\r\n\r\n",
    "a bad chunk of a HEAD": CHUNKED.replace(b"POST", b"HEAD") + b"zz\r\n",
}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


async def answer_to(port: int, raw: bytes) -> httpx.Response:
    """All that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


@pytest.mark.parametrize("name", BAD)
async def test_it_is_a_400(port: int, log: pytest.LogCaptureFixture, name: str) -> None:
    response = await answer_to(port, BAD[name])
    assert response.headers["content-type"] == "application/json"
    assert response.headers["connection"] == "close"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        text = (await client.get("/metrics")).text
    counted = [line for line in text.splitlines() if line.startswith("disco_http_requests_total{")]
    counted = [line for line in counted if not line.endswith(" 0.0")]  # failures, before there are any
    known = "/v1/completions" in "".join(counted)  # a route had it before its body broke off
    assert known or counted == ['disco_http_requests_total{route="unmatched",status="400"} 1.0']
    assert len(counted) == 1 and counted[0].endswith(" 1.0") and known == name.startswith("a bad")
    if name.endswith("HEAD"):
        assert response.status_code == 400 and not response.content
    else:
        assert int(response.headers["content-length"]) == len(response.content)
        assert check_error(response, 400)["code"] == "invalid_http"
    told = [record for record in log.records if record.name == "server.http1_protocol"]
    assert [record.getMessage() for record in told] == ["a request that is not HTTP: 400"]
    assert all(record.levelno <= logging.INFO for record in log.records)
    assert "forged" not in log.text
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health")).status_code == 200


async def test_headers_without_end_are_a_431(port: int, log: pytest.LogCaptureFixture) -> None:
    """The answer comes, though the client has sent far more than is read before it."""
    raw = b"GET /health HTTP/1.1\r\nhost: tiny\r\na: " + b"x" * 2**20
    error = check_error(await answer_to(port, raw), 431)
    assert error["code"] == "headers_too_large"
    assert all(record.levelno <= logging.INFO for record in log.records)


async def test_an_answer_is_not_followed_by_another(
    make_app: Callable[..., FastAPI], log: pytest.LogCaptureFixture
) -> None:
    """The app has answered before the body is whole, and then the body breaks."""
    async with listening(make_app(api_key=[SecretStr("one")])) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED)
        assert b" 401 " in await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)
        writer.write(b"zz\r\n")
        rest = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_api_key"
    assert all(record.levelno <= logging.INFO for record in log.records)


async def test_what_came_before_is_answered(port: int) -> None:
    """A good request and then nonsense on the same connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /version HTTP/1.1\r\nhost: tiny\r\n\r\nnonsense\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert [answer.count(b"HTTP/1.1 " + status) for status in (b"200", b"400")] == [1, 1]
    assert b'"invalid_http"' in answer


async def test_an_empty_line_before_a_request_is_ignored(port: int) -> None:
    body = json.dumps(GOOD).encode()
    whole = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    last = b"\r\nGET /health HTTP/1.1\r\nhost: tiny\r\nconnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in (b"\r\n" + whole, b"\r", b"\n" + whole + last):
        writer.write(part)
        await asyncio.sleep(0.05)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"HTTP/1.1") == 3


async def test_an_upgrade_is_served_as_it_is(port: int, log: pytest.LogCaptureFixture) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=GOOD, headers=headers)
    assert response.status_code == 200
    assert all(record.levelno <= logging.INFO for record in log.records)
