"""The server's app as a replica of Ray Serve runs it: calls through it, health, metrics, its end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from starlette.types import Message

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray import bridge
from disco_ray.call import Call, portable

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)


def call(**body: Any) -> Call:
    scope = {
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
    }
    return Call(portable(scope), json.dumps({"model": "tiny", "prompt": "hello", **body}).encode(), None)


def text_of(messages: list[Message]) -> str:
    return b"".join(each.get("body", b"") for each in messages).decode()


@pytest.fixture
async def started(make_app: Callable[..., FastAPI]) -> AsyncIterator[FastAPI]:
    app = make_app()
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
        yield app


async def test_an_answer_in_one_body(started: FastAPI) -> None:
    got = [each async for batch in bridge.run(started, call(), "r1") for each in batch]
    assert got[0]["status"] == 200
    assert json.loads(text_of(got))["choices"][0]["text"] == " world, the stop is here"


async def test_a_stream(started: FastAPI) -> None:
    got = [each async for batch in bridge.run(started, call(stream=True), "r1") for each in batch]
    assert text_of(got).endswith("data: [DONE]\n\n")


async def test_bad_input_is_the_apps_business(started: FastAPI) -> None:
    got = [each async for batch in bridge.run(started, call(max_tokens="x"), "r1") for each in batch]
    assert got[0]["status"] == 400 and json.loads(text_of(got))["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_that_leaves_aborts_the_generation(
    started: FastAPI, engine: FakeEngine, stream: bool
) -> None:
    engine.stall_after = 4
    async with aclosing(bridge.run(started, call(stream=stream), "r1")) as batches:
        assert await anext(batches) == []
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.wait_for(engine.stalled.wait(), 10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert engine.aborts == 1


@pytest.fixture
def replica_class(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, engine: FakeEngine) -> Any:
    """The class, around the scripted engine, as replica r1, the second one of its node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it is imported
        from disco_ray import replica

    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), rank=SimpleNamespace(local_rank=1))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica, "prepare", lambda config: tokenizer)
    monkeypatch.setattr(replica, "WorkerEngine", lambda config, **_: engine)
    monkeypatch.setattr(replica.logs, "configure", lambda *_: None)
    return replica.Replica


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def made(replica_class: Any, port: int, **settings: Any) -> Any:
    """A replica whose metrics are at `port`."""
    replica = replica_class.__new__(replica_class)
    await replica.__init__({"target": "tiny", "draft": "none", **settings}, "127.0.0.1", port - 1)
    return replica


@needs_ray
async def test_a_replica_answers_and_can_be_scraped(replica_class: Any, free_port: int) -> None:
    replica = await made(replica_class, free_port, metrics_label="zone=a")
    try:
        got = [each async for batch in replica.answer(call()) for each in batch]
        assert got[0]["status"] == 200
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"http://127.0.0.1:{free_port}/metrics")).text
        assert 'disco_engine_up{replica="r1",zone="a"} 1.0' in metrics.replace(
            '{zone="a",replica="r1"}', '{replica="r1",zone="a"}'
        )
    finally:
        await replica.__del__()
    with socket.create_server(("127.0.0.1", free_port)):
        pass  # the port is free again


@needs_ray
async def test_a_replica_waits_for_a_metrics_port_that_is_taken(replica_class: Any, free_port: int) -> None:
    before = socket.create_server(("127.0.0.1", free_port))
    making = asyncio.create_task(made(replica_class, free_port))
    await asyncio.sleep(0.5)
    assert not making.done()
    before.close()
    replica = await asyncio.wait_for(making, 10)
    await replica.__del__()


@needs_ray
async def test_a_replica_is_unhealthy_once_its_engine_is_dead(
    replica_class: Any, free_port: int, engine: FakeEngine
) -> None:
    replica = await made(replica_class, free_port)
    try:
        for state in ("ready", "restarting"):
            engine.state = state  # type: ignore[assignment]
            await replica.check_health()
        engine.state = "dead"
        with pytest.raises(RuntimeError, match="dead"):
            await replica.check_health()
    finally:
        await replica.__del__()


@needs_ray
async def test_a_replica_says_why_its_engine_cannot_load(
    replica_class: Any, free_port: int, engine: FakeEngine
) -> None:
    from engine.types import EngineUnavailable

    engine.load_error = EngineUnavailable("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        await made(replica_class, free_port)
    assert engine.state == "closed"
