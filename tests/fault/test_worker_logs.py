"""The engine's process writes its log as the server does."""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.types import EngineUnavailable, GenerateRequest
from server.log_lines import JsonLines

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import RAISE


async def test_its_lines_are_json_where_the_servers_are(capfd: pytest.CaptureFixture[str]):
    engine = WorkerEngine(EngineConfig(target="ok"), "scripted_engine:Scripted", log_formatter=JsonLines())
    await engine.start()
    with pytest.raises(EngineUnavailable):
        async for _ in engine.generate(GenerateRequest(id="r", prompt_ids=(RAISE,))):
            pass
    await engine.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (told,) = [line for line in lines if line["logger"] == "engine.worker"]
    assert told["level"] == "error" and "Traceback" in told["exception"]


async def test_a_log_that_nobody_reads_does_not_stop_the_engine() -> None:
    unread, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    before = os.dup(2)
    os.dup2(end, 2)
    try:
        engine = WorkerEngine(EngineConfig(target="ok"), "scripted_engine:Scripted", restart_delay=0.05)
        await engine.start()
        with pytest.raises(EngineUnavailable, match="the step is broken"):
            async for _ in engine.generate(GenerateRequest(id="r", prompt_ids=(RAISE,))):
                pass
        while engine.state != "ready":
            await asyncio.sleep(0.01)
        assert engine.restarts == 1
        await engine.close()
    finally:
        os.dup2(before, 2)
        for each in (before, unread, end):
            os.close(each)
