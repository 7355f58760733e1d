"""A request's time: its own `timeout`, or the server's. Over it there is a clear error and a free engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_support import events_of, listening, running
from test_admission import ROUTES, MakeApp
from test_bad_input import GOOD, check_error


def late(error: dict[str, Any]) -> None:
    assert error["type"] == "timeout_error"
    assert (error["code"], error["param"]) == ("deadline_exceeded", "timeout")


@pytest.mark.parametrize("of_server", [False, True])
@pytest.mark.parametrize("stall", [0, 4])
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_an_answer_that_comes_too_late(
    make_app: MakeApp, engine: FakeEngine, path: str, body: dict[str, Any], stall: int, of_server: bool
) -> None:
    """In the queue or in the middle of the text: 504, and the engine is told to stop."""
    engine.stall_after = stall
    given = {} if of_server else {"timeout": 0.1}
    async with running(make_app(max_request_seconds=0.1)) as client:
        begin = time.monotonic()
        late(check_error(await client.post(path, json=body | given), 504, "timeout_error"))
        assert 0.1 <= time.monotonic() - begin < 5
        assert engine.aborts == len(engine.requests) == 1
        text = (await client.get("/metrics")).text
    assert "disco_expired_requests_total 1.0" in text
    assert "disco_requests_in_flight 0.0" in text and "disco_queued_requests 0.0" in text


@pytest.mark.parametrize(("path", "body"), ROUTES[:2])
async def test_a_stream_ends_with_the_error(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.stall_after = 4
    response = await client.post(path, json=body | {"stream": True, "n": 2, "timeout": 0.1})
    *chunks, last = events_of(response)
    assert response.status_code == 200 and chunks and all("choices" in chunk for chunk in chunks)
    late(last["error"])
    assert engine.aborts == 2


async def test_a_stream_of_responses_ends_with_it_too(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stall_after = 4
    path, body = ROUTES[2]
    *_, error, failed = events_of(await client.post(path, json=body | {"stream": True, "timeout": 0.1}))
    assert (error["type"], error["code"]) == ("error", "deadline_exceeded")
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert engine.aborts == 1


async def test_a_client_that_does_not_read_does_not_keep_the_engine(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    engine.make_room(10**6)
    engine.answer = [engine.answer[0]] * 200_000
    async with listening(make_app()) as port:
        content = httpx.Request("POST", "http://t", json=GOOD | {
            "stream": True, "timeout": 0.3, "max_tokens": 200_000, "ignore_eos": True,
        }).content  # fmt: skip
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        async with asyncio.timeout(10):
            while not engine.aborts:
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_time_runs_while_a_grammar_is_compiled(make_app: MakeApp, engine: FakeEngine) -> None:
    async def compile(structure: object, tenant: str) -> None:
        await asyncio.sleep(60)

    app = make_app()
    app.state.context.grammars.compile = compile
    async with running(app) as client:
        for path, body in ROUTES[:2]:
            asked = body | {"structured_outputs": {"regex": "a"}, "timeout": 0.1}
            for streamed in (False, True):
                response = await client.post(path, json=asked | {"stream": streamed})
                late(check_error(response, 504, "timeout_error"))
    assert not engine.requests


async def test_time_enough_changes_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, body in ROUTES:
        plain, timed = [await client.post(path, json=body | more) for more in ({}, {"timeout": 60})]
        assert plain.status_code == timed.status_code == 200
        assert plain.json()["usage"] == timed.json()["usage"]
    assert engine.aborts == 0


async def test_a_request_may_give_itself_less_than_the_server(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.stall_after = 0
    async with running(make_app(max_request_seconds=60.0)) as client:
        async with asyncio.timeout(10):
            response = await client.post("/v1/completions", json=GOOD | {"timeout": 0.05})
    late(check_error(response, 504, "timeout_error"))
