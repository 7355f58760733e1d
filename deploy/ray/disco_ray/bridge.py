"""One call through an app in this process: ASGI messages out, as many at a time as there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message

from disco_ray.call import REPLICA_HEADER, Call, restored

_AHEAD = 1024
"""Messages that the app may be ahead of what was taken over."""


async def run(app: ASGIApp, call: Call, replica: str) -> AsyncGenerator[list[Message], None]:
    """The app's answer, with the replica's id in its headers. An empty list comes first: the call is taken.

    Closed or cancelled early, the app is cancelled too, which aborts what it generates. Raises what the
    app raises.
    """
    yield []
    outbox: asyncio.Queue[Message] = asyncio.Queue(_AHEAD)
    body = [call.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await asyncio.Event().wait()  # the client's leaving comes as a cancellation
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REPLICA_HEADER] = replica
        await outbox.put(message)

    task = asyncio.create_task(app(restored(call), receive, send))
    try:
        while messages := await _next(outbox, task):
            yield messages
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next(outbox: asyncio.Queue[Message], task: asyncio.Task[None]) -> list[Message]:
    """All messages there are, at least one; none once the app is through."""
    if outbox.empty() and not task.done():
        first = asyncio.ensure_future(outbox.get())
        try:
            await asyncio.wait({first, task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            first.cancel()
            raise
        if first.done():
            return [first.result(), *_drained(outbox)]
        first.cancel()
    return _drained(outbox)


def _drained(outbox: asyncio.Queue[Message]) -> list[Message]:
    return [outbox.get_nowait() for _ in range(outbox.qsize())]
