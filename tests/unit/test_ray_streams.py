"""How the check of Ray Serve reads an answer: what broke off is neither whole nor a clear error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from ray_check import streams
from ray_check.streams import Outcome

FIRST = {"choices": [{"text": "ab"}]}
LAST = {"choices": [{"text": "c"}], "usage": {"completion_tokens": 3}}
ERROR = {"error": {"message": "gone", "type": "x", "param": None, "code": "replica_died"}}


def events(*data: Any) -> bytes:
    return b"".join(
        b"data: " + (d if isinstance(d, bytes) else json.dumps(d).encode()) + b"\n\n" for d in data
    )


async def read(status: int, body: bytes) -> Outcome:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=body, headers={streams.REPLICA_HEADER: "r1"})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
        return await streams._stream(client, {}, lambda: None)


async def test_a_whole_stream() -> None:
    got = await read(200, events(FIRST, LAST, b"[DONE]"))
    assert (got.text, got.tokens, got.chunks, got.replica, got.whole) == ("abc", 3, 2, "r1", True)
    assert not got.clear_error


@pytest.mark.parametrize(
    ("status", "body"), [(503, json.dumps(ERROR).encode()), (200, events(FIRST, ERROR)), (200, events(ERROR))]
)
async def test_a_clear_error(status: int, body: bytes) -> None:
    got = await read(status, body)
    assert got.clear_error and got.code == "replica_died" and not got.whole


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, events(FIRST)), (200, b""), (200, b"data: {"), (502, b"Bad gateway"), (500, b'{"detail": "x"}')],
)
async def test_what_breaks_off_is_neither_whole_nor_clear(status: int, body: bytes) -> None:
    got = await read(status, body)
    assert not got.whole and not got.clear_error


def test_half_of_the_requests_are_greedy_and_half_are_seeded() -> None:
    bodies = streams.bodies("tiny", 8)
    assert len({body["prompt"] for body in bodies}) == 64
    assert sum(body["temperature"] == 0 for body in bodies) == 32
    assert all("seed" in body or body["temperature"] == 0 for body in bodies)
