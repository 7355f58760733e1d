"""How the engine's process may end, and what its waiters then hear; the next one is there soon."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.client_process import Worker
from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.types import CompiledGrammar, EngineUnavailable, SamplingParams, TokenEvent

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import BREAK_ADD, CLOSES, CUTS, EXIT, GARBAGE, HANG, KILL, LONG, RAISE, SLOW, WAITS
from worker_support import FACTORY, read, request, tokens, until


@pytest.mark.parametrize(("kind", "cause"), [(EXIT, r"exit code 7"), (KILL, r"signal 9")])
async def test_a_death_fails_the_waiters_and_new_requests_are_served(
    engine: WorkerEngine, kind: int, cause: str
):
    bystander = asyncio.create_task(read(engine, request(SLOW, 10**5)))
    seen: list[TokenEvent] = []
    with pytest.raises(EngineUnavailable, match=f"the engine process died .{cause}.; it is being restarted"):
        async for event in engine.generate(request(kind, max_tokens=9)):
            seen.append(event)
    assert tokens(seen) == [0, 1][: len(seen)]  # a sudden death may swallow what was not yet sent
    with pytest.raises(EngineUnavailable, match=cause):
        await bystander
    assert engine.state == "restarting"
    with pytest.raises(EngineUnavailable, match="restarting"):
        await read(engine, request())
    await engine.check(request())  # needs no engine
    await until(lambda: engine.state == "ready")
    assert engine.restarts == 1
    assert tokens(await read(engine, request())) == list(range(5))


@pytest.mark.parametrize(("kind", "cause"), [(RAISE, "the step is broken"), (BREAK_ADD, "add is broken")])
async def test_a_fault_fails_every_open_request_and_says_why(
    capfd: pytest.CaptureFixture[str], kind: int, cause: str
):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05)
    await engine.start()
    bystander = asyncio.create_task(read(engine, request(SLOW, 10**5)))
    await asyncio.sleep(0.1)
    seen: list[TokenEvent] = []
    with pytest.raises(EngineUnavailable, match=cause):
        async for event in engine.generate(request(kind, max_tokens=9)):
            seen.append(event)
    assert tokens(seen) == ([0, 1] if kind == RAISE else [])  # nothing that was computed is lost
    with pytest.raises(EngineUnavailable, match=f"{cause}; it is being restarted"):
        await bystander
    await until(lambda: engine.restarts == 1 and engine.state == "ready")
    assert tokens(await read(engine, request())) == list(range(5))
    await engine.close()
    stderr = capfd.readouterr().err
    assert "Traceback" in stderr and f"RuntimeError: {cause}" in stderr


async def test_a_hung_step_is_ended(tmp_path: Path):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05, step_timeout=0.5)
    await engine.start()
    with pytest.raises(EngineUnavailable, match="hung"):
        await read(engine, request(HANG, max_tokens=9))
    await until(lambda: engine.state == "ready")
    assert tokens(await read(engine, request())) == list(range(5))
    await engine.close()


async def test_an_engine_that_is_stopped_is_stalled_then_ended(caplog: pytest.LogCaptureFixture):
    """Meanwhile nobody is let in, and one whose waiters have left is ended all the same."""
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05, step_timeout=1.0)
    await engine.start()
    stream = engine.generate(request(SLOW, 10**5))
    await anext(stream)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    await stream.aclose()
    await until(lambda: engine.state == "stalled")
    with pytest.raises(EngineUnavailable, match="stalled: no step for"):
        await read(engine, request())
    await until(lambda: engine.state == "restarting")
    await until(lambda: engine.state == "ready")
    assert engine.restarts == 1
    assert tokens(await read(engine, request())) == list(range(5))
    assert "is stalled" in caplog.text and "hung: no step for 1 s" in caplog.text
    await engine.close()


async def test_a_stalled_engine_that_goes_on_is_ready_again():
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, step_timeout=2.0)
    await engine.start()
    reader = asyncio.create_task(read(engine, request(SLOW, 50)))
    await asyncio.sleep(0.2)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    await until(lambda: engine.state == "stalled")
    os.kill(engine.pid, signal.SIGCONT)
    assert tokens(await reader) == list(range(50))
    assert (engine.state, engine.restarts) == ("ready", 0)
    await engine.close()


@pytest.mark.parametrize("kind", [LONG, WAITS], ids=["told to have no end", "waits for a grammar"])
async def test_the_limit_is_not_for_what_has_none(kind: int):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, step_timeout=0.4)
    await engine.start()
    grammar = CompiledGrammar(key="nothing", data=b"-") if kind == WAITS else None
    asked = msgspec.structs.replace(request(kind), params=SamplingParams(max_tokens=5, grammar=grammar))
    assert tokens(await read(engine, asked)) == list(range(5))  # it takes 1.2 s
    assert (engine.state, engine.restarts) == ("ready", 0)
    await engine.close()


async def test_a_message_that_cannot_be_read_ends_the_process_not_the_supervision():
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05)
    await engine.start()
    with pytest.raises(EngineUnavailable, match="could not be taken"):
        await read(engine, request(GARBAGE, 10**5))
    await until(lambda: engine.state == "ready")
    assert tokens(await read(engine, request())) == list(range(5))
    await engine.close()


@pytest.mark.parametrize("kind", [CLOSES, CUTS], ids=["its socket is closed", "its line is cut"])
async def test_the_line_breaks(kind: int):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05, step_timeout=1.0)
    await engine.start()
    with pytest.raises(EngineUnavailable):
        await read(engine, request(kind, 10**5))
    await until(lambda: engine.state == "ready")
    assert engine.restarts == 1
    assert tokens(await read(engine, request())) == list(range(5))
    await engine.close()


async def test_an_engine_that_dies_at_once_does_not_spin(caplog: pytest.LogCaptureFixture):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.1, longest_delay=0.4)
    await engine.start()
    for _ in range(4):
        with pytest.raises(EngineUnavailable):
            await read(engine, request(EXIT))
        await until(lambda: engine.state == "ready")
    delays = re.findall(r"exit code 7.; started again in (\S+) s", caplog.text)
    assert delays == ["0.1", "0.2", "0.4", "0.4"]
    await engine.close()


async def test_a_line_that_fails_ends_the_process_not_the_supervision(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05)
    await engine.start()
    first, pid = engine._worker, engine.pid
    assert pid is not None
    sound = Worker.receive

    def receive(worker: Worker) -> asyncio.Future[bytes]:
        if worker is first:
            raise OSError("the line is gone")
        return sound(worker)

    monkeypatch.setattr(Worker, "receive", receive)
    with pytest.raises(EngineUnavailable, match="could not be attended: OSError: the line is gone; it is"):
        await read(engine, request(SLOW, 10**5))
    await until(lambda: engine.state == "ready")
    assert engine.restarts == 1 and not psutil.pid_exists(pid)
    assert tokens(await read(engine, request())) == list(range(5))
    await engine.close()
    assert "the engine process cannot be attended" in caplog.text
