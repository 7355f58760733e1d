"""The front: an ASGI app that takes a request in whole, hands it to a replica, and passes the answer on.

Ray's own HTTP proxy chooses a replica before it has read the body, so it cannot know the prefix. The front
has read it. It also knows what to say when a replica dies, where the proxy would only break off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from disco_ray.affinity import affinity_key
from disco_ray.call import Answers, Call, Submit, portable
from server.errors import RETRY_AFTER_SECONDS, ApiError

log = logging.getLogger(__name__)

_METRICS = "/metrics"
_EVENTS = "text/event-stream"


class FrontApp:
    """`submit` sends a call to a replica. `max_body_bytes`: the largest body that is taken in, as in the
    server's settings. `accept_seconds`: how long a request may wait for a replica that has room. `count` is
    told the code of every error that the front answers itself, for no replica's metrics have them.
    """

    def __init__(
        self, submit: Submit, max_body_bytes: int, accept_seconds: float, count: Callable[[str], None]
    ) -> None:
        self._submit, self._max_body_bytes, self._accept_seconds = submit, max_body_bytes, accept_seconds
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1003})
        answer = _Answer(scope["path"], send)
        try:
            if scope["path"] == _METRICS:
                raise _no_metrics()
            body = await self._read(scope, receive)
            if body is not None:
                await self._relay(
                    Call(portable(scope), body, affinity_key(scope["path"], body)), receive, answer
                )
        except ApiError as error:
            if not answer.ended:
                self._count(error.body["error"]["code"])
            await answer.fail(error)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left before it was whole. Raises ApiError 413."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._max_body_bytes:
                text = f"the request body is larger than {self._max_body_bytes} bytes"
                raise ApiError(413, text, code="request_too_large", headers={"Connection": "close"})
        return b"".join(parts)

    async def _relay(self, call: Call, receive: Receive, answer: _Answer) -> None:
        """Passes the answer on. If the client leaves, or this is cancelled, so is the work on it."""
        answers = self._submit(call)
        passing = asyncio.create_task(self._pass_on(answers, answer))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            answers.cancel()
            for task in (passing, gone):
                task.cancel()
            await asyncio.gather(passing, gone, return_exceptions=True)

    async def _pass_on(self, answers: Answers, answer: _Answer) -> None:
        try:
            await asyncio.wait_for(anext(aiter(answers)), self._accept_seconds)
            async for messages in answers:
                for message in messages:
                    await answer.send(message)
        except TimeoutError as error:
            text = f"no replica had room for the request within {self._accept_seconds:g} s"
            raise _unavailable(text, "no_replica") from error
        except BackPressureError as error:
            raise _unavailable("too many requests wait for a replica", "no_replica") from error
        except RayTaskError as error:
            log.error("a replica failed at a request", exc_info=error)
            raise ApiError(500, "internal server error", code="internal_error") from error
        except (RayError, RayServeException) as error:
            log.warning("a replica is gone under a request: %s", error)
            raise _unavailable("the replica that served the request died", "replica_died") from error


class _Answer:
    """The answer to one request: knows how far it is, and so how an error can still be told."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._started = self.ended = self._streams = False
        self._events = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            del headers["x-request-id"]  # Ray's proxy adds the same one
            self._started, self._streams = True, headers.get("content-type", "").startswith(_EVENTS)
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            self._events += message.get("body", b"").startswith(b"event: ")
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Tells the error: as the answer, or as the last event of a stream. What is neither breaks off."""
        if self.ended:
            return
        if not self._started:
            await error.response()({"type": "http"}, _nothing, self._send)
        elif self._streams:
            await self._send({"type": "http.response.body", "body": self._event(error), "more_body": False})
        else:
            raise error

    def _event(self, error: ApiError) -> bytes:
        if not self._path.startswith("/v1/responses"):
            return b"data: " + msgspec.json.encode(error.body) + b"\n\n"
        told = error.body["error"]
        data = {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"]}
        encoded = msgspec.json.encode({**data, "sequence_number": self._events})
        return b"event: error\ndata: " + encoded + b"\n\n"


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def _no_metrics() -> ApiError:
    text = "metrics are of one replica: scrape each replica's own port (docs/operations.md)"
    return ApiError(404, text, code="not_found")


async def _live(receive: Receive, send: Send) -> None:
    """The lifespan of an app that has nothing to start or end."""
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    raise RuntimeError("an error's answer reads no body")
