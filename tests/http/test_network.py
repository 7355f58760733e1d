"""What clients do to sockets: slow, silent, half-closed, many, never reading; what framing must not pass."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening
from test_bad_input import GOOD, check_error
from test_http1 import answer_to

from server.http1_protocol import Protocol

MakeApp = Callable[..., FastAPI]
POST = b"POST /v1/completions HTTP/1.1\r\nhost: tiny\r\n"


def request(body: dict[str, Any], version: bytes = b"1.1", more: bytes = b"") -> bytes:
    data = json.dumps(body).encode()
    head = POST.replace(b"1.1", version) + more + b"content-length: %d\r\n\r\n" % len(data)
    return head + data


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
        (POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/3.0\r\nhost: a\r\n\r\n", 505, "http_version_not_supported"),
        (b"GET /health HTTP/0.9\r\nhost: a\r\n\r\n", 505, "http_version_not_supported"),
        (POST + b"expect: foo\r\ncontent-length: 2\r\n\r\n{}", 417, "expectation_failed"),
        (POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n", 413, "request_too_large"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nb: " + b"a" * 16384 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET nowhere HTTP/1.1\r\nhost: a\r\n\r\n", 400, "invalid_http"),
        (b"GET ftp://a/health HTTP/1.1\r\nhost: a\r\n\r\n", 400, "invalid_http"),
        (b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n", 400, "invalid_http"),
    ],
)
async def test_what_is_refused_of_http(port: int, raw: bytes, status: int, code: str) -> None:
    answer = await answer_to(port, raw)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["connection"] == "close"


async def test_a_refused_head_has_no_body(port: int) -> None:
    answer = await answer_to(port, b"HEAD /health HTTP/3.0\r\nhost: a\r\n\r\n")
    assert (answer.status_code, answer.content) == (505, b"")


async def test_an_absolute_target_is_served(port: int) -> None:
    raw = b"GET http://elsewhere:1/v1/models?a=b HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    assert (await answer_to(port, raw)).json()["object"] == "list"


async def test_a_long_path_is_not_echoed(port: int) -> None:
    raw = b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    assert len(check_error(await answer_to(port, raw), 404)["message"]) < 300
    answer = await answer_to(port, request(GOOD | {"model": "m" * 9000}, more=b"connection: close\r\n"))
    assert len(check_error(answer, 404)["message"]) < 400


async def test_405_names_head(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.delete("/v1/models")).headers["allow"] == "GET, HEAD"
        assert (await client.get("/v1/completions")).headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
async def test_who_has_ended_its_side_is_answered(port: int, engine: FakeEngine, stream: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(GOOD | {"stream": stream}) + b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n")
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.count(b"HTTP/1.1 200 ") == 2 and b'"version"' in answer
    assert engine.aborts == 0


async def test_a_half_closed_stream_goes_on_after_a_probe(port: int, engine: FakeEngine) -> None:
    engine.stall_after = 4
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(GOOD | {"stream": True}))
    await engine.stalled.wait()
    writer.write_eof()
    await asyncio.sleep(0.2)
    engine.go_on.set()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert b"\n:\n\n" in answer and b"data: [DONE]" in answer and engine.aborts == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_who_has_left_is_not_generated_for(
    port: int, engine: FakeEngine, stream: bool, version: bytes
) -> None:
    engine.stall_after = 4
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(GOOD | {"stream": stream}, version))
    await engine.stalled.wait()
    writer.close()
    async with asyncio.timeout(5):
        while not engine.aborts:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"GET /hea", "headers"),
        (POST, "headers"),
        (POST + b"content-length: 100\r\n\r\n", "body"),
        (POST + b"content-length: 100\r\n\r\n{", "body"),
        (POST + b"transfer-encoding: chunked\r\n\r\n5\r\n{", "body"),
    ],
)
async def test_what_does_not_come_is_not_waited_for(
    make_app: MakeApp, raw: bytes, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with listening(make_app(read_seconds=0.2)) as port:
        answer = await answer_to(port, raw.replace(b"\r\n\r\n", b"\r\nx-request-id: mine\r\n\r\n", 1))
        error = check_error(answer, 408)
        assert error["code"] == "request_timeout" and what in error["message"]
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    route = "/v1/completions" if what == "body" else "unmatched"  # for the books, too
    told = [record for record in caplog.records if record.name == "server.logs" and "408" in record.message]
    assert len(told) == (what == "body")
    if what == "body":
        assert answer.headers["x-request-id"] == "mine"
    assert f'disco_http_requests_total{{route="{route}",status="408"}} 1.0' in text
    assert 'status="499"' not in text


async def test_a_trickle_is_not_waited_for(make_app: MakeApp) -> None:
    """Some bytes now and then do not hold a connection: they come at less than 1000 a second."""
    async with listening(make_app(read_seconds=0.3)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"content-length: 10000\r\n\r\n")
        start = asyncio.get_running_loop().time()
        try:
            for _ in range(100):
                writer.write(b" ")
                await asyncio.sleep(0.05)
                if reader.at_eof() or reader._buffer:  # type: ignore[attr-defined]
                    break
        except ConnectionError:
            pass
        assert asyncio.get_running_loop().time() - start < 2
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_slow_writer_that_gets_on_is_served(make_app: MakeApp) -> None:
    data = json.dumps(GOOD).encode() + b" " * 2000
    async with listening(make_app(read_seconds=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(data))
        for start in range(0, len(data), 500):  # longer than read_seconds, and faster than it must be
            writer.write(data[start : start + 500])
            await asyncio.sleep(0.1)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_who_says_nothing_is_closed(make_app: MakeApp) -> None:
    async with listening(make_app(read_seconds=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_an_answer_may_take_longer_than_reading(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.stall_after = 2
    async with listening(make_app(read_seconds=0.1)) as port, httpx.AsyncClient() as client:
        task = asyncio.create_task(client.post(f"http://127.0.0.1:{port}/v1/completions", json=GOOD))
        await engine.stalled.wait()
        await asyncio.sleep(0.3)
        engine.go_on.set()
        assert (await task).status_code == 200


async def test_who_reads_nothing_is_given_up(
    make_app: MakeApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its buffers are bounded, its request ends, and nobody else notices."""
    caplog.set_level(logging.INFO)
    engine.make_room(100_000)
    engine.script = lambda _: [5] * 20_000
    async with listening(make_app(write_seconds=0.3)) as port:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
        deaf.send(request(GOOD | {"stream": True, "max_tokens": 20_000, "ignore_eos": True}))
        async with asyncio.timeout(120):
            while not (told := [record for record in caplog.records if record.name == "server.logs"]):
                await asyncio.sleep(0.05)
        assert told[0].fields["outcome"] == "abort"  # type: ignore[attr-defined]
        engine.script = None
        async with httpx.AsyncClient() as client:
            assert (
                await client.post(f"http://127.0.0.1:{port}/v1/completions", json=GOOD)
            ).status_code == 200
        deaf.close()


async def test_who_reads_a_large_answer_late_leaves_no_trace(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock of what is closing ends with it."""
    app = make_app(write_seconds=0.2, max_body_bytes=10**7)
    data = json.dumps({"model": "tiny", "tokens": [70] * 1_000_000}).encode()
    async with listening(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /detokenize HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(data) + data)
        assert len(await asyncio.wait_for(reader.read(), 30)) > 1_000_000
        writer.close()
        await asyncio.sleep(0.5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


async def test_the_dead_are_noticed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that vanished says nothing: the kernel asks, and gives up what nobody takes."""
    seen: list[tuple[int, int]] = []
    made = Protocol.connection_made

    def connection_made(self: Protocol, transport: asyncio.Transport) -> None:
        made(self, transport)
        peer = transport.get_extra_info("socket")
        for level, option in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        ):
            seen.append((option, peer.getsockopt(level, option)))

    monkeypatch.setattr(Protocol, "connection_made", connection_made)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await client.get("/health")
    assert seen == [(socket.SO_KEEPALIVE, 1), (socket.TCP_USER_TIMEOUT, 60_000)]


async def test_connections_are_bounded(make_app: MakeApp) -> None:
    async with listening(make_app(max_connections=3)) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        answer = await answer_to(port, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert check_error(answer, 503, "service_unavailable_error")["code"] == "too_many_connections"
        assert answer.headers["retry-after"]
        many = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        for _, writer in held + many:
            writer.close()
        await asyncio.sleep(1.2)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200


async def test_a_thousand_resets_harm_nobody(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for place in range(1000):
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if place % 2:
                peer.send(request(GOOD)[: place % 120])
        if place % 50 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


@pytest.mark.parametrize(
    "raw", [b'{"model": "tiny", "prompt": "\xff"}', b"\xfe\xff", b'{"prompt": "\xed\xa0\x80"}', b"\xf0\x9f"]
)
async def test_bodies_that_are_no_utf8(port: int, raw: bytes) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
            error = check_error(await client.post(path, content=raw), 400)
            assert error["code"] == "invalid_json" and "UTF-8" in error["message"]


async def test_headers_and_paths_that_are_no_utf8(port: int) -> None:
    raw = b"GET /v1/models/%ff%00%c0%ae HTTP/1.1\r\nhost: a\r\nx-request-id: \xff\xfe\r\n"
    answer = await answer_to(port, raw + b"authorization: \xff\r\nconnection: close\r\n\r\n")
    assert check_error(answer, 404)["code"] == "model_not_found"
