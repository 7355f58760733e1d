"""The engine's process: starts that fail, and starts again after the system was short of something."""

import asyncio
import errno
import multiprocessing.process
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from engine import client_worker
from engine.client_process import Worker
from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.types import EngineUnavailable

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import EXIT, KILL
from worker_support import FACTORY, PATIENCE, read, request, tokens, until


@pytest.mark.parametrize(
    ("target", "reason"), [("unknown", "unknown model 'unknown'"), ("exits", "exit code 3")]
)
async def test_what_cannot_load_says_why(target: str, reason: str):
    engine = WorkerEngine(EngineConfig(target=target), FACTORY)
    with pytest.raises(EngineUnavailable, match=reason):
        async with asyncio.timeout(PATIENCE):
            await engine.start()
    assert (engine.state, engine.restarts) == ("dead", 0)
    with pytest.raises(EngineUnavailable, match=reason):
        _ = engine.info
    await engine.close()
    assert engine.state == "closed"


async def test_a_factory_must_be_a_name_that_exists():
    with pytest.raises(ValueError, match=r"package\.module:name"):
        WorkerEngine(EngineConfig(target="ok"), "os.system('x')")
    engine = WorkerEngine(EngineConfig(target="ok"), "scripted_engine:Missing")
    with pytest.raises(EngineUnavailable, match="Missing"):
        await engine.start()
    await engine.close()


async def test_five_failed_loads_in_a_row_are_the_end(tmp_path: Path):
    loads = tmp_path / "loads"
    loads.write_text("2")
    engine = WorkerEngine(EngineConfig(target=str(loads)), FACTORY, restart_delay=0.01)
    await engine.start()
    for _ in range(1):  # a load that works again starts the count anew
        with pytest.raises(EngineUnavailable):
            await read(engine, request(EXIT))
        await until(lambda: engine.state == "ready")
    with pytest.raises(EngineUnavailable):
        await read(engine, request(EXIT))
    await until(lambda: engine.state == "dead")
    assert engine.restarts == 6
    assert loads.read_text() == "-5"
    with pytest.raises(EngineUnavailable, match="no more loads"):
        await read(engine, request())
    await engine.close()


async def restarted(engine: WorkerEngine) -> None:
    """Kills the engine and waits for the next one, which serves."""
    before = engine.restarts
    with pytest.raises(EngineUnavailable):
        await read(engine, request(KILL, max_tokens=9))
    await until(lambda: engine.restarts > before and engine.state in ("ready", "dead"))
    assert tokens(await read(engine, request())) == list(range(5))


async def test_a_socket_folder_that_was_deleted_is_made_anew(engine: WorkerEngine, tmp_path: Path):
    """The living engine does without it, and the next one has its own."""
    for _ in range(2):
        [folder] = tmp_path.iterdir()
        shutil.rmtree(folder)
        assert tokens(await read(engine, request())) == list(range(5))
        await restarted(engine)


async def test_an_engine_whose_socket_is_deleted_while_it_starts_is_a_failed_start(
    engine: WorkerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Worker] = []

    def unlucky(*arguments: Any) -> Worker:
        made.append(Worker(*arguments))
        if len(made) == 1:  # its interpreter starts yet
            [folder] = tmp_path.iterdir()
            shutil.rmtree(folder)
        return made[-1]

    monkeypatch.setattr(client_worker, "Worker", unlucky)
    await restarted(engine)
    assert engine.restarts == 2


async def test_a_server_without_file_descriptors_lives_and_connects_once_it_has_some(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def poor(*arguments: Any) -> Worker:
        made = Worker(*arguments)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return made

    monkeypatch.setattr(client_worker, "Worker", poor)
    with pytest.raises(EngineUnavailable):
        await read(engine, request(KILL, max_tokens=9))
    try:
        await until(lambda: engine.pid is not None and engine.restarts == 1)
        await asyncio.sleep(2.0)  # meanwhile it connects, or would
        assert engine.state == "restarting"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await until(lambda: engine.state == "ready")
    assert engine.restarts == 1 and tokens(await read(engine, request())) == list(range(5))


def test_a_start_that_is_short_of_any_file_descriptors_raises_and_ends_nothing(tmp_path: Path):
    """In processes of their own, which ZeroMQ would abort: a start with 0, 1, 2 ... descriptors left."""
    script = tmp_path / "start.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, os, resource, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
        from multiprocessing import resource_tracker
        from engine.client_process import Worker
        from engine.config import EngineConfig

        async def start(left):
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            taken = []
            try:
                while True:
                    taken.append(os.dup(0))
            except OSError:
                for each in taken[:left]:
                    os.close(each)
            try:
                Worker(EngineConfig(target="ok"), {FACTORY!r}, None).destroy()
                print("started", flush=True)
            except OSError as error:
                print(error, flush=True)

        if __name__ == "__main__":
            resource_tracker.ensure_running()
            for left in range(13):
                if os.fork() == 0:
                    asyncio.run(start(left))
                    os._exit(0)
                print(os.wait()[1], flush=True)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.stdout.splitlines() == ["[Errno 24] Too many open files", "0"] * 13, done.stderr


SHORTAGES = {
    "no pipe": (multiprocessing.process.BaseProcess, "start", OSError(errno.EMFILE, "Too many open files")),
    "no fork": (multiprocessing.process.BaseProcess, "start", BlockingIOError(errno.EAGAIN, "try again")),
    "no memory": (multiprocessing.process.BaseProcess, "start", MemoryError()),
    "no folder": (tempfile, "mkdtemp", OSError(errno.ENOSPC, "No space left on device")),
    "no context": (zmq.asyncio, "Context", zmq.ZMQError(errno.EMFILE)),
    "no socket": (zmq.asyncio.Context, "socket", zmq.ZMQError(errno.EMFILE)),
    "no line": (zmq.asyncio.Socket, "connect", zmq.ZMQError(errno.EMFILE)),
    "no watch": (Worker, "receive", OSError(errno.ENOMEM, "Cannot allocate memory")),
}


@pytest.mark.parametrize("where", SHORTAGES)
async def test_a_process_that_cannot_be_started_is_a_failed_start(
    engine: WorkerEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
):
    engine._longest_delay = 0.05
    owner, name, error = SHORTAGES[where]
    works, left = getattr(owner, name), 0

    def fails(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        started = any(hasattr(each, "inbox") for each in arguments)  # a worker that is made already
        if left == 0 or started:
            return works(*arguments, **named)
        left -= 1
        raise error

    monkeypatch.setattr(owner, name, fails)
    left = 4
    await restarted(engine)  # which begins the count anew
    assert left == 0
    told = [record for record in caplog.records if "cannot be started" in record.message]
    assert len(told) == 4 and all(type(error).__name__ in each.message for each in told)
    assert not any(each.exc_info for each in told)
    left = 5
    with pytest.raises(EngineUnavailable):
        await read(engine, request(KILL, max_tokens=9))
    await until(lambda: engine.state == "dead")
    assert left == 0 and "cannot be started" in engine.why


async def test_a_first_process_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch):
    def fails() -> None:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(zmq.asyncio, "Context", fails)
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY)
    with pytest.raises(EngineUnavailable, match="cannot be started: ZMQError: Too many open files"):
        async with asyncio.timeout(PATIENCE):
            await engine.start()
    assert (engine.state, engine.restarts) == ("dead", 0)
    await engine.close()
