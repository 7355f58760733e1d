"""How answers leave: server-sent events, or one body; either way nobody generates for a client that left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from sse_starlette.sse import EventSourceResponse

from server import admission
from server.errors import CLIENT_GONE, ApiError, to_api_error
from server.http1 import LATE_SECONDS

T = TypeVar("T")


def sse(chunks: AsyncGenerator[dict[str, Any], None], shutdown_seconds: float) -> Response:
    """Streams `chunks` as events, then [DONE]. An error is the last event, without a [DONE] after it."""
    return EventSourceResponse(
        _events(chunks), sep="\n", shutdown_grace_period=shutdown_seconds + LATE_SECONDS
    )


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except Exception as error:  # the status is out: what went wrong can only be told in the stream
            yield _event(to_api_error(error).body)
            return
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json_line(data) + b"\n\n"


def json_line(data: dict[str, Any]) -> bytes:
    """JSON without what Unicode calls the end of a line: clients that split text so would cut an event."""
    encoded = msgspec.json.encode(data)
    for char in "\x85\u2028\u2029":
        encoded = encoded.replace(char.encode(), rf"\u{ord(char):04x}".encode())
    return encoded


async def plain(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The answer as one JSON body. A client that leaves meanwhile cancels the work on it."""
    return Response(msgspec.json.encode(await attended(request, answer)), media_type="application/json")


async def timely(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """As `attended`, but raises ApiError once the request's time is over, or the server's."""
    return await attended(request, _stoppable(work))


async def _stoppable(work: Coroutine[Any, Any, T]) -> T:
    """To be a task of its own: that is what is cancelled."""
    task, told = asyncio.current_task(), list[ApiError]()
    assert task is not None

    def stop(error: ApiError) -> None:
        told.append(error)
        task.cancel()

    with admission.current().stopping(stop):
        try:
            return await work
        except asyncio.CancelledError:
            if told:
                raise told[0] from None
            raise


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. A client that leaves meanwhile cancels it: ApiError 499, which nobody reads."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client left")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
