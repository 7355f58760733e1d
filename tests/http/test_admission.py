"""Who is let in: the queue and its bounds, told at once, whatever came before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from test_bad_input import CHAT, GOOD, check_error
from transformers import PreTrainedTokenizerBase

from server.bounds import LARGE_BODIES

RESPONSES = {"model": "tiny", "input": "hello"}
ROUTES = [("/v1/completions", GOOD), ("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES)]
MakeApp = Callable[..., FastAPI]


@asynccontextmanager
async def stalled(
    client: httpx.AsyncClient, engine: FakeEngine, *bodies: dict[str, Any]
) -> AsyncIterator[None]:
    """These requests are open meanwhile, and the engine has said nothing of them."""
    engine.stall_after, before = 0, len(engine.requests)
    sent = [asyncio.create_task(client.post("/v1/completions", json=GOOD | body)) for body in bodies]
    async with asyncio.timeout(10):
        while len(engine.requests) < before + sum(body.get("n", 1) for body in bodies):
            await asyncio.sleep(0.001)
    try:
        yield
    finally:
        engine.go_on.set()
        for each in await asyncio.gather(*sent):
            assert each.status_code == 200, each.text
        engine.stall_after = None
        engine.go_on.clear()


def full(response: httpx.Response) -> dict[str, Any]:
    error = check_error(response, 429, "rate_limit_error")
    assert error["code"] == "queue_full" and error["param"] is None
    assert 1 <= int(response.headers["retry-after"]) <= 60
    return error


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_full_queue_is_told(
    make_app: MakeApp, engine: FakeEngine, path: str, body: dict[str, Any], streamed: bool
) -> None:
    """One runs, two wait; the fourth is refused, on every route, and taken once there is room again."""
    async with running(make_app(max_num_seqs=1, max_queued_requests=2)) as client:
        async with stalled(client, engine, {}, {}, {}):
            full(await client.post(path, json=body | {"stream": streamed}))
            text = (await client.get("/metrics")).text
            assert "disco_queued_requests 2.0" in text and "disco_queued_requests_limit 2.0" in text
        assert (await client.post(path, json=body | {"stream": streamed})).status_code == 200
        text = (await client.get("/metrics")).text
    assert f'disco_http_requests_total{{route="{path}",status="429"}} 1.0' in text
    assert 'disco_refused_requests_total{reason="queue_requests"} 1.0' in text
    assert "disco_queued_requests 0.0" in text and "disco_queued_tokens 0.0" in text


async def test_no_queue_at_all(make_app: MakeApp, engine: FakeEngine) -> None:
    async with running(make_app(max_num_seqs=2, max_queued_requests=0)) as client:
        async with stalled(client, engine, {}, {}):
            full(await client.post("/v1/completions", json=GOOD))
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200


async def test_sequences_that_run_do_not_wait(make_app: MakeApp, engine: FakeEngine) -> None:
    """One that has its first token holds a place of the batch, and none of the queue."""
    async with running(make_app(max_num_seqs=1, max_queued_requests=1)) as client:
        engine.stall_after = 1
        posts = []
        for _ in range(5):  # the fake engine runs them all
            engine.stalled.clear()
            posts.append(asyncio.create_task(client.post("/v1/completions", json=GOOD)))
            await asyncio.wait_for(engine.stalled.wait(), 10)
        assert "disco_queued_requests 0.0" in (await client.get("/metrics")).text
        async with stalled(client, engine, {}):
            assert "disco_queued_requests 1.0" in (await client.get("/metrics")).text
            full(await client.post("/v1/completions", json=GOOD))
        assert {(await each).status_code for each in posts} == {200}


async def test_choices_and_prompts_take_a_place_each(make_app: MakeApp, engine: FakeEngine) -> None:
    async with running(make_app(max_num_seqs=1, max_queued_requests=3)) as client:
        async with stalled(client, engine, {}, {}):
            error = full(await client.post("/v1/completions", json=GOOD | {"n": 3}))
            assert "3 sequences" in error["message"]
            full(await client.post("/v1/completions", json=GOOD | {"prompt": ["a", "b", "c"]}))
            async with asyncio.timeout(10):
                more = asyncio.create_task(client.post("/v1/completions", json=GOOD | {"n": 2}))
                while len(engine.requests) < 4:
                    await asyncio.sleep(0.001)
        assert (await more).status_code == 200


async def test_one_that_could_never_enter_is_taken_when_nothing_waits(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    async with running(make_app(max_num_seqs=1, max_queued_requests=1, max_queued_tokens=2)) as client:
        large = GOOD | {"n": 8, "prompt": "hello there world " * 3}
        assert (await client.post("/v1/completions", json=large)).status_code == 200
        async with stalled(client, engine, {}):
            full(await client.post("/v1/completions", json=large))


async def test_tokens_that_wait_are_bounded(make_app: MakeApp, engine: FakeEngine) -> None:
    long = "hello there world " * 5
    async with running(make_app(max_queued_tokens=30)) as client:
        async with stalled(client, engine, {"prompt": "hello"}):
            error = full(await client.post("/v1/completions", json=GOOD | {"prompt": long * 2}))
            assert "tokens" in error["message"]
        assert (await client.post("/v1/completions", json=GOOD | {"prompt": long})).status_code == 200
        text = (await client.get("/metrics")).text
    assert 'disco_refused_requests_total{reason="queue_tokens"} 1.0' in text
    assert "disco_queued_tokens_limit 30.0" in text


async def test_a_body_is_not_read_when_the_queue_is_full(make_app: MakeApp, engine: FakeEngine) -> None:
    app = make_app(max_num_seqs=1, max_queued_requests=0)
    async with (
        listening(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        stalled(client, engine, {}),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n{")
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")
        writer.close()


async def test_bodies_that_come_slowly_hold_no_place(make_app: MakeApp, engine: FakeEngine) -> None:
    """Nobody else is told that the queue is full while nothing waits."""
    app = make_app(max_num_seqs=1, max_queued_requests=1)
    async with listening(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        for _, writer in slow:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n{")
        await asyncio.sleep(0.1)
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
        for _, writer in slow:
            writer.close()


async def test_large_bodies_under_way_are_bounded_together(make_app: MakeApp, engine: FakeEngine) -> None:
    app = make_app(max_body_bytes=100_000)
    async with listening(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LARGE_BODIES + 1)]
        for _, writer in held:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100000\r\n\r\n")
            writer.write(b" " * 99_000)
            await writer.drain()
        large = {"content": json.dumps(GOOD).encode() + b" " * 90_000}
        async with asyncio.timeout(10):
            while (answer := await client.post("/v1/completions", **large)).status_code == 200:
                pass
        full(answer)
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
        for _, writer in held:
            writer.close()
        async with asyncio.timeout(10):
            while (await client.post("/v1/completions", **large)).status_code != 200:
                pass
        assert 'refused_requests_total{reason="body_bytes"}' in (await client.get("/metrics")).text


async def test_routes_that_do_not_generate_are_open_when_the_queue_is_full(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    app = make_app(max_num_seqs=1, max_queued_requests=0)
    async with running(app) as client, stalled(client, engine, {}):
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        answer = await client.post("/tokenize", json={"model": "tiny", "prompt": "hello"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "body", [{"prompt": 1.5}, {"prompt": "a", "logit_bias": {"999": 1}}, {"model": "no"}]
)
async def test_what_is_refused_for_itself_leaves_no_trace(
    make_app: MakeApp, engine: FakeEngine, body: dict[str, Any]
) -> None:
    async with running(make_app(max_num_seqs=1, max_queued_requests=0, key_concurrency=1)) as client:
        for _ in range(5):
            assert (await client.post("/v1/completions", json=GOOD | body)).status_code in (400, 404)
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
        assert "disco_queued_requests 0.0" in (await client.get("/metrics")).text


async def test_clients_that_leave_give_their_places_back(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.stall_after = 0
    app = make_app(max_num_seqs=1, max_queued_requests=1, key_concurrency=2)
    async with listening(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for streamed in (False, True):
            posts = [client.post("/v1/completions", json=GOOD | {"stream": streamed}) for _ in range(2)]
            tasks = [asyncio.create_task(post) for post in posts]
            while len(engine.requests) < 2 * (1 + streamed):
                await asyncio.sleep(0.001)
            assert (await client.post("/v1/completions", json=GOOD)).status_code == 429
            for task in tasks:
                task.cancel()
            async with asyncio.timeout(10):
                while "disco_requests_in_flight 0.0" not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.01)
        engine.stall_after = None
        for _ in range(3):
            assert (await client.post("/v1/completions", json=GOOD)).status_code == 200


async def test_what_a_stop_string_ends_holds_no_place(
    make_app: MakeApp, engine: FakeEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Though another sequence of its request still runs."""
    text = tokenizer.encode("one STOP and so on", add_special_tokens=False)
    engine.script = lambda request: text * 2 if list(request.prompt_ids) == prompts[0] else [5] * 60
    prompts = [[7], [8]]
    engine.stall_after, engine.block = len(text), 1
    body = GOOD | {"prompt": prompts, "max_tokens": 60, "stop": "STOP", "ignore_eos": True}
    async with running(make_app(max_num_seqs=2, max_queued_requests=0)) as client:
        both = asyncio.create_task(client.post("/v1/completions", json=body))
        async with asyncio.timeout(10):
            while engine.aborts < 1:
                await asyncio.sleep(0.001)
        assert not both.done()
        async with stalled(client, engine, {}):
            assert "disco_queued_requests 0.0" in (await client.get("/metrics")).text
        assert (await both).status_code == 200


async def test_an_engine_that_dies_leaves_nothing_in_the_queue(make_app: MakeApp, engine: FakeEngine) -> None:
    async with running(make_app(max_num_seqs=1, max_queued_requests=0)) as client:
        engine.die_after = 0
        for _ in range(3):
            assert (await client.post("/v1/completions", json=GOOD)).status_code == 503
            engine.state = "ready"
        engine.die_after = None
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200


async def test_the_wait_is_told_by_how_the_queue_moves(make_app: MakeApp, engine: FakeEngine) -> None:
    app = make_app(max_num_seqs=1, max_queued_requests=40)
    async with running(app) as client:
        for _ in range(3):
            await client.post("/v1/completions", json=GOOD)
        door = app.state.context.door
        now = asyncio.get_running_loop().time()
        door._begun.clear()
        door._begun.extend(now - 10 + 5 * i for i in range(2))  # one in five seconds
        async with stalled(client, engine, *({} for _ in range(41))):
            response = await client.post("/v1/completions", json=GOOD)
            full(response)
    assert response.headers["retry-after"] == "60"  # 200 would be more than clients should be told


@pytest.mark.parametrize(("path", "body"), [*ROUTES, ("/tokenize", {"prompt": "hello"})])
async def test_another_spelling_of_a_route_is_no_way_around_the_gate(
    make_app: MakeApp, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    """A router's pattern may end before a line's end: what it lets through is held to the same bounds."""
    async with running(make_app(key_requests_per_minute=2)) as client:
        sent = [(await client.post(each, json=body)).status_code for each in [f"{path}%0A"] * 3 + [path]]
        text = (await client.get("/metrics")).text
    assert sent == [200, 200, 429, 429]
    assert f'disco_http_requests_total{{route="{path}",status="429"}} 2.0' in text
    assert 'disco_refused_requests_total{reason="key_requests"} 2.0' in text
