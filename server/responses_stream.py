"""Named, numbered server-sent events: the stream of /v1/responses. It ends with its last event, no [DONE]."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from sse_starlette.sse import EventSourceResponse

from server.http1 import LATE_SECONDS
from server.responses_events import Event
from server.stream import json_line


def named_events(events: AsyncGenerator[Event, None], shutdown_seconds: float) -> Response:
    """Each event under its `type`, with a `sequence_number` from 0 on."""
    grace = shutdown_seconds + LATE_SECONDS
    return EventSourceResponse(_encoded(events), sep="\n", shutdown_grace_period=grace)


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    number = 0
    async with aclosing(events):
        async for event in events:
            data = json_line({**event, "sequence_number": number})
            yield b"event: " + event["type"].encode() + b"\ndata: " + data + b"\n\n"
            number += 1
