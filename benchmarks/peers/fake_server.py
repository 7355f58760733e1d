"""The peer with no model: sends chunks at a set pace, which shows what the load generator itself can read."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

TOKEN = b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"fake","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],"usage":null}\n\n'  # noqa: E501
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@contextmanager
def serving(chunks_per_second: float) -> Iterator[str]:
    """The base URL of a server in a process of its own; the pace is that of each stream."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=_serve, args=(theirs, 1 / chunks_per_second), daemon=True)
    child.start()
    theirs.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        child.terminate()
        child.join()
        ours.close()


def _serve(pipe: Connection, step: float) -> None:
    asyncio.run(_listen(pipe, step))


async def _listen(pipe: Connection, step: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await _head(reader):
                length = int(head[b"content-length"])
                tokens = json.loads(await reader.readexactly(length))["max_tokens"]
                await _stream(writer, tokens, step)
        except ConnectionError:
            pass  # the client has what it wanted
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _head(reader: asyncio.StreamReader) -> dict[bytes, bytes]:
    """The headers of the next request, names in lower case; empty where the client has gone."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    except asyncio.IncompleteReadError:
        return {}
    pairs = (line.split(b":", 1) for line in lines[1:] if line)
    return {name.lower(): value.strip() for name, value in pairs}


async def _stream(writer: asyncio.StreamWriter, tokens: int, step: float) -> None:
    """One answer: a chunk every `step` seconds by the clock, then usage and [DONE]."""
    clock = asyncio.get_running_loop().time
    begin = clock()
    writer.write(HEAD)
    chunk = _framed(TOKEN)
    for number in range(1, tokens + 1):
        await asyncio.sleep(begin + number * step - clock())
        writer.write(chunk)
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
    writer.write(_framed(f"data: {usage}\n\ndata: [DONE]\n\n".encode()) + b"0\r\n\r\n")
    await writer.drain()


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
