"""A call through an app: what a replica of Ray Serve does with it."""

from __future__ import annotations

import asyncio
import pickle
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray import bridge
from disco_ray.call import REPLICA_HEADER, Call, portable, restored

SCOPE: Scope = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "method": "POST",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"",
    "headers": [[b"content-type", b"application/json"]],
    "client": ["10.0.0.1", 4000],
    "server": None,
    "http_version": "1.1",
    "scheme": "http",
    "root_path": "",
    "app": object(),
    "router": object(),
    "extensions": {},
}


def call(body: bytes = b"hello") -> Call:
    return Call(portable(SCOPE), body, None)


class App:
    """Echoes its body in two parts, then does what it is told."""

    def __init__(self, then: str = "end") -> None:
        self._then = then
        self.cancelled = False
        self.seen: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen = scope
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": body[1:], "more_body": self._then != "end"})
        if self._then == "raise":
            raise RuntimeError("broken")
        if self._then == "wait":
            try:
                await receive()
            except asyncio.CancelledError:
                await asyncio.sleep(0)  # as an abort that has to be sent
                self.cancelled = True
                raise


async def collect(app: Any) -> list[list[Message]]:
    return [messages async for messages in bridge.run(app, call(), "r1")]


def test_a_call_crosses_processes() -> None:
    carried = pickle.loads(pickle.dumps(call()))
    scope = restored(carried)
    assert scope["path"] == "/v1/completions" and scope["client"] == ("10.0.0.1", 4000)
    assert scope["headers"] == [(b"content-type", b"application/json")]
    assert not {"app", "router", "extensions", "server"} & scope.keys()


async def test_the_first_batch_is_empty_and_the_rest_is_the_answer() -> None:
    batches = await collect(App())
    messages = [message for batch in batches for message in batch]
    assert batches[0] == [] and all(batches[1:])
    assert (REPLICA_HEADER.encode(), b"r1") in messages[0]["headers"]
    assert b"".join(each.get("body", b"") for each in messages) == b"hello"
    assert messages[-1]["more_body"] is False


async def test_messages_come_as_they_are_sent() -> None:
    async with aclosing(bridge.run(App("wait"), call(), "r1")) as batches:
        assert await anext(batches) == []
        early = await anext(batches)
        assert early[-1]["body"] == b"h"


async def test_a_consumer_that_leaves_cancels_the_app() -> None:
    app = App("wait")
    async with aclosing(bridge.run(app, call(), "r1")) as batches:
        for _ in range(3):
            await anext(batches)
    assert app.cancelled


async def test_a_cancelled_consumer_cancels_the_app() -> None:
    app = App("wait")
    consumer = asyncio.create_task(collect(app))
    await asyncio.sleep(0.05)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert app.cancelled


async def test_what_the_app_raises_comes_after_what_it_sent() -> None:
    got: list[Message] = []
    with pytest.raises(RuntimeError, match="broken"):
        async for messages in bridge.run(App("raise"), call(), "r1"):
            got += messages
    assert [each.get("body") for each in got] == [None, b"h", b"ello"]


async def test_a_slow_consumer_gets_everything() -> None:
    async def many(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3000):
            await send({"type": "http.response.body", "body": b"%d," % number, "more_body": number < 2999})

    got = b""
    async for messages in bridge.run(many, call(), "r1"):
        await asyncio.sleep(0)
        got += b"".join(each.get("body", b"") for each in messages)
    assert got == b"".join(b"%d," % number for number in range(3000))
