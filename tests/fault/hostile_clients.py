"""Clients that behave badly while others are served. Each says what was wrong about its answer, or None."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from ground import Ground

Client = Callable[["Ground", bool], Awaitable[str | None]]
READ_SECONDS = WRITE_SECONDS = 2.0  # the server's clocks here
_HELD = 1000  # connections at once
_LATE = 60.0  # seconds; a bound for hangs


def _post(stream: bool, **fields: Any) -> bytes:
    body = {
        "model": "tiny",
        "prompt": "hostile",
        "max_tokens": 8,
        "temperature": 0,
        "stream": stream,
        **fields,
    }
    return _head(len(data := json.dumps(body).encode())) + data


def _head(length: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        % length
    )


async def _answer(here: Ground, raw: bytes) -> bytes:
    """What the server says to these bytes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    writer.write(raw)
    try:
        return await asyncio.wait_for(reader.read(), _LATE)
    finally:
        writer.close()


def _not(status: int, answer: bytes) -> str | None:
    return None if answer.startswith(b"HTTP/1.1 %d " % status) else f"not {status}, but {answer[:80]!r}"


def _holds(here: Ground, port: int) -> bool:
    """Whether the server, which is in this process, has a connection with this port of a client."""
    held = psutil.Process().net_connections("tcp")
    return any(c.laddr.port == here.port and c.raddr and c.raddr.port == port for c in held)


async def never_reads(here: Ground, stream: bool) -> str | None:
    """A long answer, of which nothing but its status is taken: it is given up."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, ("127.0.0.1", here.port))
    own = deaf.getsockname()[1]
    await loop.sock_sendall(deaf, _post(stream, n=8, max_tokens=200, logprobs=5, ignore_eos=True))
    if wrong := _not(200, await asyncio.wait_for(loop.sock_recv(deaf, 13), _LATE)):
        return wrong
    begun = time.monotonic()
    while (held := _holds(here, own)) and time.monotonic() < begun + _LATE:
        await asyncio.sleep(0.1)
    deaf.close()
    return f"it was still held after {_LATE} s" if held else None


async def writes_slowly(here: Ground, stream: bool) -> str | None:
    """A body of which a byte comes now and then."""
    whole = _post(stream)
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    writer.write(whole[: whole.index(b"{")])
    reading = asyncio.create_task(reader.read())
    for place in range(whole.index(b"{"), len(whole)):
        writer.write(whole[place : place + 1])
        await asyncio.wait([reading], timeout=0.2)
        if reading.done():
            break
    writer.close()
    return _not(408, await reading)


async def ends_its_side(here: Ground, stream: bool) -> str | None:
    """It listens, and is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
    writer.write(_post(stream))
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), _LATE)
    writer.close()
    return _not(200, answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))


async def resets(here: Ground, stream: bool) -> str | None:
    """In the middle of its answers, many times."""
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(_post(stream, max_tokens=200, ignore_eos=True))
        if stream:
            await asyncio.wait_for(reader.readline(), _LATE)
        else:
            await asyncio.sleep(0.05)
        peer: socket.socket = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return None


async def connects(here: Ground, stream: bool) -> str | None:
    """A thousand at once that say nothing, or half of a request: all are closed in time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * _HELD)), hard))
    held = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(_HELD)]
    for _, writer in held[::2]:
        writer.write(_post(stream)[:60])
    ends = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in held)), _LATE)
    for _, writer in held:
        writer.close()
    return next((_not(408, said) for said in ends[::2] if _not(408, said)), None)


async def no_utf8(here: Ground, stream: bool) -> str | None:
    raw = _post(stream, prompt="12345").replace(b"12345", b"\xff\xfe\xed\xa0\x80")
    return _not(400, await _answer(here, raw))


async def no_http(here: Ground, stream: bool) -> str | None:
    for raw in (
        b"\x16\x03\x01\x02\x00" + bytes(range(256)),
        b"\xff" * 4096 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\r\0\n\n\n\n",
    ):
        if not (answer := await _answer(here, raw)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 ")):
            return f"{raw[:20]!r} got {answer[:80]!r}"
    return None
