"""The engine loads, dies, fails; the client leaves. Everyone is told, and nothing runs on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import events_of, listening, running
from test_bad_input import CHAT, GOOD, check_error

from engine.types import EngineUnavailable
from server.log_lines import one_line

ROUTES = [("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)]


async def test_503_while_loading(make_app: Callable[..., FastAPI], engine: FakeEngine) -> None:
    engine.hold_loading = asyncio.Event()
    async with running(make_app()) as client:
        for path in ("/health", "/ready", "/v1/policies"):
            response = await client.get(path)
            check_error(response, 503, "service_unavailable_error")
            assert int(response.headers["retry-after"]) > 0
        for path, body in ROUTES:
            response = await client.post(path, json=body)
            check_error(response, 503, "service_unavailable_error")
            assert int(response.headers["retry-after"]) > 0
        assert (await client.get("/v1/models")).status_code == 200
        assert "disco_engine_up 0.0" in (await client.get("/metrics")).text
        engine.hold_loading.set()
        await asyncio.sleep(0.01)
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        assert "disco_engine_up 1.0" in (await client.get("/metrics")).text


async def test_health_says_why_it_cannot_load(make_app: Callable[..., FastAPI], engine: FakeEngine) -> None:
    engine.load_error = EngineUnavailable("no such model: 'tiny'")
    async with running(make_app()) as client:
        error = check_error(await client.get("/health"), 503, "service_unavailable_error")
    assert "dead" in error["message"] and "no such model" in error["message"]


async def test_health_says_why_there_is_no_engine_any_more(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.state, engine.why = "dead", "five loads failed"
    error = check_error(await client.get("/health"), 503, "service_unavailable_error")
    assert error["message"] == "the engine is dead: five loads failed"


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_the_engine_dies(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.die_after = 4
    response = await client.post(path, json=body)
    check_error(response, 503, "service_unavailable_error")
    assert "retry-after" in response.headers
    check_error(await client.get("/health"), 503, "service_unavailable_error")
    engine.state, engine.die_after = "ready", None
    assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_the_engine_dies_in_a_stream(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.die_after = 4
    *chunks, last = events_of(await client.post(path, json=body | {"stream": True, "n": 2}))
    assert chunks and all("choices" in chunk for chunk in chunks)
    assert last["error"]["type"] == "service_unavailable_error"
    assert last["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_one_request_fails(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail_after = 4
    error = check_error(await client.post(path, json=body), 500, "server_error")
    assert "NaN" in error["message"]
    *_, last = events_of(await client.post(path, json=body | {"stream": True}))
    assert "NaN" in last["error"]["message"]
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_masks_that_leave_nothing_are_the_clients_fault(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail_after, engine.masks_fail = 4, True
    error = check_error(await client.post(path, json=body), 400)
    assert error["code"] == "no_token_allowed" and "nothing may follow" in error["message"]
    *_, last = events_of(await client.post(path, json=body | {"stream": True}))
    assert last["error"]["code"] == "no_token_allowed"


async def test_a_client_that_leaves_while_its_grammar_compiles_stops_that(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def compile(structure: object, tenant: str) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    app = make_app()
    app.state.context.grammars.compile = compile
    async with listening(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = GOOD | {"structured_outputs": {"regex": "a"}}
        content = httpx.Request("POST", "http://tiny", json=body).content
        head = f"POST /v1/completions HTTP/1.1\r\nhost: tiny\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await asyncio.wait_for(begun.wait(), 10)
        writer.close()
        await asyncio.wait_for(ended.wait(), 10)
    assert not engine.requests


def test_a_path_cannot_forge_lines_of_the_log() -> None:
    assert one_line("/v1/ä\n\x1b[0m") == "/v1/ä\\n\\x1b[0m"


async def test_our_own_fault_is_a_500_without_details(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def script(request: object) -> list[int]:
        raise ZeroDivisionError("secret")

    engine.script = script
    response = await client.post("/v1/completions", json=GOOD)
    check_error(response, 500, "server_error")
    assert "secret" not in response.text


async def test_a_fault_outside_generation_is_a_500_too(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(request: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "check", check)
    response = await client.post("/v1/completions", json=GOOD)
    check_error(response, 500, "server_error")
    assert "secret" not in response.text


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_client_that_leaves_aborts(
    port: int, engine: FakeEngine, path: str, body: dict[str, Any], streamed: bool
) -> None:
    engine.stall_after = 4
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    content = httpx.Request("POST", "http://tiny", json=body | {"stream": streamed, "n": 2}).content
    head = f"POST {path} HTTP/1.1\r\nhost: tiny\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await asyncio.wait_for(engine.stalled.wait(), 10)
    assert engine.aborts == 0
    writer.close()
    await asyncio.wait_for(_until(lambda: engine.aborts == 2), 10)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        metrics = (await client.get("/metrics")).text
    assert 'disco_requests_total{outcome="abort"} 2.0' in metrics
    assert "disco_requests_in_flight 0.0" in metrics


async def test_one_failed_choice_aborts_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after = 4
    check_error(await client.post("/v1/completions", json=GOOD | {"n": 3}), 500, "server_error")
    assert len(engine.requests) == 3
    assert "disco_requests_in_flight 0.0" in (await client.get("/metrics")).text


async def test_open_streams_are_finished_at_shutdown(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    """The server stops while a stream is open: the stream goes on to its end."""
    engine.stall_after = 4
    async with httpx.AsyncClient() as client:
        async with listening(make_app()) as port:
            url = f"http://127.0.0.1:{port}/v1/completions"
            request = client.build_request("POST", url, json=GOOD | {"stream": True, "max_tokens": 60})
            response = await client.send(request, stream=True)
            await engine.stalled.wait()
            # long after the server began to stop, and after sse-starlette would have noticed
            asyncio.get_running_loop().call_later(1.5, engine.go_on.set)
        text = (await response.aread()).decode()
    assert text.endswith("data: [DONE]\n\n")


async def test_large_bodies_over_a_socket(port: int) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/v1/completions", content=b"x" * 2**21)
    check_error(response, 413)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_gauges_of_a_dead_engine_are_zero(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json=GOOD)
    assert "disco_requests_running 1.0" in (await client.get("/metrics")).text
    engine.state = "restarting"
    assert "disco_requests_running 0.0" in (await client.get("/metrics")).text
    engine.state, engine.restarts = "ready", 1
    text = (await client.get("/metrics")).text
    assert "disco_requests_running 0.0" in text and "disco_kv_blocks_used 0.0" in text


async def test_a_text_that_cannot_fit_is_refused_without_encoding(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was encoded")

    monkeypatch.setattr("server.render.Renderer._encode", refuse)
    huge = "a " * 5_000
    response = await client.post("/v1/completions", json=GOOD | {"prompt": huge})
    assert check_error(response, 400)["code"] == "context_length_exceeded"
    response = await client.post(
        "/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": huge}]}
    )
    error = check_error(response, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_a_client_that_leaves_while_sending_is_no_fault(make_app: Callable[..., FastAPI]) -> None:
    async with listening(make_app()) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.2)
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'status="499"' in text and not re.search(r'status="500"} [^0]', text)
