"""Some hundred of the fuzzer's inputs, and that it sees faults; tests/fault/fuzz_http.py sends more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from chat_support import Grammars
from fake_engine import FakeEngine
from fastapi import FastAPI
from fault.fuzzing.exchange import Told, exchange, fuzz
from fault.fuzzing.inputs import Input, Inputs
from http_support import listening
from pydantic import SecretStr

KEY = "sk-a-key-for-tests"


async def test_nothing_breaks(
    make_app: Callable[..., FastAPI],
    engine: FakeEngine,
    grammars: Grammars,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.make_room(512)
    app = make_app(api_key=[SecretStr(KEY)], read_seconds=0.3)
    app.state.context.grammars = grammars  # noted, not compiled: starting the compiler takes seconds
    async with listening(app) as port:
        told = await fuzz("127.0.0.1", port, Inputs(7, KEY, "tiny"), 500, 8)
        assert not told.faults, "\n".join(told.faults)
        assert told.statuses[200] > 100 and told.statuses[400] > 50 and told.statuses[401], told.statuses
        assert len(told.kinds) == 11
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


async def test_a_fault_of_ours_is_seen(port: int, engine: FakeEngine) -> None:
    async def check(_: object) -> None:
        raise RuntimeError("a bug")

    engine.check = check  # type: ignore[method-assign]
    inputs, told = Inputs(1, KEY, "tiny"), Told()
    while (given := inputs.next()).kind != "good" or b"POST /v1/completions" not in given.pieces[0]:
        pass
    told.add(given, *await exchange("127.0.0.1", port, given))
    assert "a 5xx" in told.faults[0]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"HTTP/1.1 500 Oh\r\n\r\n", "a 5xx"),
        (b"HTTP/1.1 200 OK\r\n\r\nTraceback (most recent call last):", "traceback"),
        (b"HTTP/1.1 400 Bad\r\n\r\nplain", "shape"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error":{"code":"internal_error"}}', "in a stream"),
    ],
)
def test_what_is_a_fault(answer: bytes, what: str) -> None:
    told = Told()
    told.add(Input("mutated", (b"x",)), answer)
    assert len(told.faults) == 1 and what in told.faults[0]


def test_good_requests_must_be_served() -> None:
    told = Told()
    told.add(Input("good", (b"x",)), b"HTTP/1.1 404 Not Found\r\n\r\n")
    assert len(told.faults) == 1


async def test_a_hang_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fault.fuzzing.exchange.SECONDS", 0.2)

    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()
        await writer.wait_closed()

    server: Any = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    told, given = Told(), Input("good", (b"x",))
    told.add(given, *await exchange("127.0.0.1", port, given))
    assert "not closed" in told.faults[0]
    over.set()
    await asyncio.sleep(0.05)
    server.close()


def test_a_seed_gives_the_same_inputs() -> None:
    one, two = (Inputs(5, KEY, "tiny") for _ in range(2))
    assert [one.next() for _ in range(300)] == [two.next() for _ in range(300)]
