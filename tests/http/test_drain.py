"""The server's end by signals: nobody new is let in, what is open ends or is told, a second one ends all."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from test_admission import ROUTES, MakeApp
from test_bad_input import GOOD, check_error
from test_large_bodies import sends_first

from server import drain

LONG = GOOD | {"max_tokens": 60}


class Process:
    """The fake engine with a process id."""

    def __init__(self, engine: FakeEngine, pid: int | None = None) -> None:
        self.pid, self._engine = pid, engine

    async def close(self) -> None:
        await self._engine.close()


class Ending:
    """A server of `drain` that serves in a task."""

    def __init__(self, app: FastAPI, seconds: float, process: Process) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = drain.Server(app, seconds, process)
        self.task = asyncio.create_task(self.server.serve(sockets=[self.listener]))

    def unread(self) -> int:
        """Bytes that wait for a client to read."""
        connections = self.server.server_state.connections
        return sum(each.transport.get_write_buffer_size() for each in connections)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}")

    async def signal(self, number: int = signal.SIGTERM) -> None:
        """As the system would: it is seen by the next tick."""
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.25)

    async def ended(self) -> int:
        """Its exit code, far sooner than the longest graces here."""
        await asyncio.wait_for(self.task, 30)
        return self.server.exit_code


@asynccontextmanager
async def ending(app: FastAPI, seconds: float = 30.0, pid: int | None = None) -> AsyncIterator[Ending]:
    engine: Any = app.state.context.engine
    each = Ending(app, seconds, Process(engine, pid))
    while not each.server.started:
        await asyncio.sleep(0.01)
    try:
        yield each
    finally:
        engine.go_on.set()
        each.server.should_exit = True
        await each.task


def quiet(caplog: pytest.LogCaptureFixture) -> None:
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


async def test_streams_finish_while_new_requests_are_refused(
    make_app: MakeApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.stall_after = 4
    async with (
        ending(make_app(), 600.0) as each,
        each.client() as client,
    ):
        assert (await client.get("/ready")).status_code == 200
        request = client.build_request("POST", "/v1/completions", json=LONG | {"stream": True})
        stream = await client.send(request, stream=True)
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=ROUTES[1][1]))
        await asyncio.wait_for(engine.stalled.wait(), 10)
        while len(engine.requests) < 2:
            await asyncio.sleep(0.01)
        await each.signal()
        for path, body in (*ROUTES, ("/tokenize", GOOD)):
            response = await client.post(path, json=body)
            check_error(response, 503, "service_unavailable_error")
            assert int(response.headers["retry-after"]) > 0 and response.headers["connection"] == "close"
        status, error, _ = await asyncio.to_thread(sends_first, each.port, 8_000_000)
        assert status == 503 and "shutting down" in error["error"]["message"]
        for path, status in (
            ("/ready", 503), ("/health", 200), ("/metrics", 200), ("/version", 200), ("/v1/models", 503),
        ):  # fmt: skip
            assert (await client.get(path)).status_code == status, path
        text = (await client.get("/metrics")).text
        assert 'disco_refused_requests_total{reason="draining"} 6.0' in text
        assert not each.task.done()
        engine.go_on.set()
        assert (await stream.aread()).decode().endswith("data: [DONE]\n\n")
        assert (await whole).status_code == 200
        assert await each.ended() == 0
    quiet(caplog)


async def test_the_grace_is_not_waited_for_when_nothing_is_open(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    async with ending(make_app(), 600.0) as each:
        await each.signal()
        assert await each.ended() == 0
    assert engine.state == "closed"


async def test_ctrl_c_drains_too(make_app: MakeApp) -> None:
    async with ending(make_app()) as each:
        await each.signal(signal.SIGINT)
        assert await each.ended() == 130


async def test_what_outlives_the_grace_is_told(
    make_app: MakeApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream, an answer in one body, and one whose grammar is still being compiled."""

    async def compile(structure: object, tenant: str) -> None:
        await asyncio.sleep(60)

    engine.stall_after = 4
    app = make_app()
    app.state.context.grammars.compile = compile
    async with (
        ending(app, 0.3) as each,
        each.client() as client,
    ):
        posts = [LONG, GOOD | {"structured_outputs": {"regex": "a"}}]
        wholes = [asyncio.create_task(client.post("/v1/completions", json=post)) for post in posts]
        request = client.build_request("POST", "/v1/completions", json=LONG | {"stream": True})
        stream = await client.send(request, stream=True)
        while len(engine.requests) < 2:
            await asyncio.sleep(0.01)
        await each.signal()
        text = (await stream.aread()).decode()
        error = json.loads(text.split("data: ")[-1])["error"]
        assert error["code"] == "engine_unavailable" and "shutting down" in error["message"]
        for whole in wholes:
            error = check_error(await whole, 503, "service_unavailable_error")
            assert "did not end in time" in error["message"]
        assert await each.ended() == 0
    assert engine.aborts == 2
    quiet(caplog)


async def test_a_request_that_has_not_come_whole_is_not_waited_for(make_app: MakeApp) -> None:
    async with ending(make_app(), 60.0) as each:
        reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n{")
        await asyncio.sleep(0.1)
        await each.signal()
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            assert await each.ended() == 0
        writer.close()


@pytest.mark.parametrize("whole", [False, True])
async def test_a_client_that_reads_nothing_is_left(
    make_app: MakeApp,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
) -> None:
    """In the middle of a stream, and with all of its answer written, which waits to be read."""
    monkeypatch.setattr("server.http1.LATE_SECONDS", 4.0)
    monkeypatch.setattr("server.drain._LEAVE_SECONDS", 3.0)
    engine.make_room(10**6)
    if whole:
        asked = GOOD | {"prompt": "hello " * 1000, "echo": True, "n": 100}
    else:
        engine.answer = [engine.answer[0]] * 300_000
        asked = GOOD | {"stream": True, "max_tokens": 300_000, "ignore_eos": True}
    content = httpx.Request("POST", "http://t", json=asked).content
    async with ending(make_app(), 0.2) as each:
        each.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", each.port))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
            client.sendall(head.encode() + content)
            async with asyncio.timeout(10):
                while not each.unread():
                    await asyncio.sleep(0.01)
            await each.signal()
            assert await each.ended() == 0
    assert engine.aborts == (0 if whole else 1)
    quiet(caplog)


async def test_a_second_signal_ends_at_once(make_app: MakeApp, engine: FakeEngine) -> None:
    """Streams are cut, and the engine's process is killed rather than asked."""
    engine.stall_after = 4
    with subprocess.Popen(["sleep", "60"]) as process:
        async with ending(make_app(), 600.0, process.pid) as each, each.client() as client:
            request = client.build_request("POST", "/v1/completions", json=LONG | {"stream": True})
            stream = await client.send(request, stream=True)
            await asyncio.wait_for(engine.stalled.wait(), 10)
            await each.signal()
            await each.signal(signal.SIGINT)
            assert await each.ended() == 130
            await each.server.left_at_once()
            assert signal.getsignal(signal.SIGTERM) is not each.server.handle_exit
            await stream.aclose()
        assert process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_are_the_callers_again_afterwards(make_app: MakeApp, number: int) -> None:
    before = signal.getsignal(number)
    async with ending(make_app()) as each:
        await each.signal()
        await each.ended()
    assert signal.getsignal(number) is before


def test_processes(tiny_llama: Path) -> None:
    """Two servers start at once on one port, a third one elsewhere: one loses in one line, one ends with its
    stream, one at once."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        ports = free.getsockname()[1], other.getsockname()[1]
    code = "from server.cli import main; main()"
    flags = ["--draft", "none", "--threads", "1", "--kv-blocks", "600", "--log-level", "warning"]
    names = ["--target", str(tiny_llama), "--served-model-name", "tiny"]
    command = [sys.executable, "-c", code, "serve", *names, *flags]
    servers = [
        subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
        for port in (ports[0], ports[0], ports[1])
    ]
    try:
        _check_processes(servers, ports)
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def _check_processes(servers: list[subprocess.Popen[str]], ports: tuple[int, int]) -> None:
    until = time.monotonic() + 200
    while all(server.poll() is None for server in servers[:2]):
        assert time.monotonic() < until
        time.sleep(0.05)
    loser = next(server for server in servers[:2] if server.poll() is not None)
    winner = next(server for server in servers[:2] if server is not loser)
    _, said = loser.communicate(timeout=10)
    assert loser.returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith(f"disco-serve: cannot listen on 127.0.0.1:{ports[0]}")
    for port in ports:
        while not _ready(port):
            assert time.monotonic() < until
            time.sleep(0.05)
    for server, port, sequences, code in ((winner, ports[0], 1, 0), (servers[2], ports[1], 32, 143)):
        url, body = f"http://127.0.0.1:{port}/v1/completions", GOOD | {"n": sequences, "max_tokens": 200}
        with httpx.stream(
            "POST", url, json=body | {"ignore_eos": True, "stream": True}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith('data: {"id"')
            server.send_signal(signal.SIGTERM)
            if server is winner:
                assert "data: [DONE]" in list(lines)
            else:
                time.sleep(0.05)
                server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=20)
        assert server.returncode == code and "Traceback" not in said and "ERROR" not in said, said


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
