"""The engine's process: everything that can befall it, and what its waiters then hear."""

import asyncio
import errno
import itertools
import multiprocessing.process
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq.asyncio

from engine import client_worker
from engine.client_process import Worker
from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.types import (
    CompiledGrammar,
    EngineUnavailable,
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
    StepStats,
    TokenEvent,
)
from server.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import (
    BREAK_ADD,
    CLOSES,
    COUNT,
    CUTS,
    EXIT,
    GARBAGE,
    HANG,
    KILL,
    LONG,
    RAISE,
    REFUSE,
    SLOW,
    WAITS,
)

FACTORY = "scripted_engine:Scripted"
PATIENCE = 60  # seconds; a bound for hangs, not a measure
numbers = itertools.count()


def request(
    kind: int = COUNT, max_tokens: int = 5, request_id: str | None = None, **more: Any
) -> GenerateRequest:
    return GenerateRequest(
        id=request_id or f"r{next(numbers)}",
        prompt_ids=(kind, 1),
        params=SamplingParams(max_tokens=max_tokens),
        **more,
    )


async def read(engine: WorkerEngine, asked: GenerateRequest) -> list[TokenEvent]:
    async with asyncio.timeout(PATIENCE):
        return [event async for event in engine.generate(asked)]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerEngine]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05, grace=1.0)
    await engine.start()
    yield engine
    await engine.close()
    assert list(tmp_path.iterdir()) == []
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    assert engine.pid is None


async def test_requests_are_served_side_by_side_and_statistics_heard(engine: WorkerEngine):
    steps: list[tuple[StepStats, list[TokenEvent]]] = []
    engine.on_step(lambda stats, events: steps.append((stats, events)))
    results = await asyncio.gather(*(read(engine, request(max_tokens=50)) for _ in range(8)))
    for events in results:
        assert tokens(events) == list(range(50))
        assert [event.finish_reason for event in events] == [None] * 49 + ["length"]
    assert sum(len(events) for _, events in steps) == 400
    assert sum(stats.rows for stats, _ in steps) == 400
    assert (engine.state, engine.restarts, engine.info.target) == ("ready", 0, "ok")


async def test_refusals_harm_nobody_else(engine: WorkerEngine):
    other = asyncio.create_task(read(engine, request(SLOW, max_tokens=20)))
    with pytest.raises(InvalidRequest) as refused:  # by the process
        await read(engine, request(REFUSE))
    assert (refused.value.message, refused.value.param, refused.value.code) == (
        "the engine says no",
        "prompt",
        "no",
    )
    with pytest.raises(InvalidRequest, match="vocabulary"):  # before it gets there
        await read(engine, request(1000))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await engine.check(request(1000))
    assert tokens(await other) == list(range(20))


async def test_an_id_is_taken_while_its_request_is_open_and_free_afterwards(engine: WorkerEngine):
    stream = engine.generate(request(SLOW, 10**5, "same"))
    await anext(stream)
    with pytest.raises(InvalidRequest, match="same"):
        await read(engine, request(request_id="same"))
    await stream.aclose()
    # At once, while events of the old one are under way: none of them may show up here.
    assert tokens(await read(engine, request(request_id="same"))) == list(range(5))
    assert tokens(await read(engine, request(request_id="same"))) == list(range(5))


async def test_leaving_early_aborts(engine: WorkerEngine):
    last: list[StepStats] = []
    served: set[str] = set()

    def listen(stats: StepStats, events: list[TokenEvent]) -> None:
        last.append(stats)
        served.update(event.id for event in events)

    engine.on_step(listen)
    stream = engine.generate(request(SLOW, 10**5))
    await anext(stream)
    await stream.aclose()
    reader = asyncio.create_task(read(engine, request(SLOW, 10**5, "cancelled")))
    await until(lambda: "cancelled" in served)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await read(engine, request())
    assert (last[-1].running, last[-1].preemptions) == (0, 2)  # the script counts aborts there


async def test_a_cut_request_is_left_and_named(engine: WorkerEngine):
    steps: list[tuple[StepStats, list[TokenEvent]]] = []
    engine.on_step(lambda stats, events: steps.append((stats, events)))
    stream = engine.generate(request(SLOW, 10**5, "cut"))
    await anext(stream)
    engine.cut("cut", 1)
    assert [event async for event in stream] == []
    await until(lambda: bool(steps) and steps[-1][0].running == 0)
    named = [i for i, (stats, _) in enumerate(steps) if stats.left]
    assert named == [len(steps) - 1] and steps[-1][0].left == ("cut",)
    assert steps[-1][0].preemptions == 1  # the script counts cuts there, too


async def test_counters_never_go_back(engine: WorkerEngine):
    metrics = Metrics()
    metrics.watch(engine, "1")

    def told(name: str) -> float:
        return metrics.registry.get_sample_value(name) or 0.0

    async def abort() -> None:
        stream = engine.generate(request(SLOW, 10**5))
        await anext(stream)
        await stream.aclose()

    for _ in range(2):
        await abort()
    await read(engine, request())
    preempted, generated = told("disco_preemptions_total"), told("disco_generated_tokens_total")
    assert preempted == 2 and generated >= 7
    with pytest.raises(EngineUnavailable):
        await read(engine, request(KILL, max_tokens=9))
    await until(lambda: engine.state == "ready")
    assert told("disco_preemptions_total") == 2 and told("disco_generated_tokens_total") >= generated
    assert told("disco_engine_restarts_total") == 1
    for _ in range(3):  # as many as before it, and more: still no sum of the former life
        await abort()
        await read(engine, request())
    assert told("disco_preemptions_total") == 5


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


async def test_an_engine_that_dies_at_once_does_not_spin(monkeypatch: pytest.MonkeyPatch):
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.1, longest_delay=0.4)
    await engine.start()
    waits = []
    for _ in range(4):
        with pytest.raises(EngineUnavailable):
            await read(engine, request(EXIT))
        await until(lambda: engine.state == "restarting" and engine.pid is None)
        begin = time.monotonic()
        await until(lambda: engine.pid is not None)
        waits.append(time.monotonic() - begin)
        await until(lambda: engine.state == "ready")
    assert waits[0] < 0.2 <= waits[2] + 0.1 and waits[3] >= 0.3
    await engine.close()


async def test_closing_a_hung_engine_kills_it(engine: WorkerEngine):
    reader = asyncio.create_task(read(engine, request(HANG, max_tokens=9)))
    await asyncio.sleep(0.2)
    await asyncio.gather(engine.close(), engine.close())
    with pytest.raises(EngineUnavailable, match="closed"):
        await reader
    assert engine.state == "closed"
    with pytest.raises(EngineUnavailable, match="closed"):
        await read(engine, request())
    with pytest.raises(RuntimeError, match="once"):
        await engine.start()


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


async def test_close_while_loading_and_before_start():
    engine = WorkerEngine(EngineConfig(target="forever"), FACTORY)
    starting = asyncio.create_task(engine.start())
    await until(lambda: engine.pid is not None)
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        await starting
    unused = WorkerEngine(EngineConfig(target="ok"), FACTORY)
    await unused.close()
    assert unused.state == "closed"


async def test_signals_to_the_group_are_not_the_engines_business():
    engine = WorkerEngine(EngineConfig(target="slow"), FACTORY)
    starting = asyncio.create_task(engine.start())
    await until(lambda: engine.pid is not None)
    assert engine.pid is not None
    while not starting.done():  # from its first instruction on, and while it loads
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.pid, each)
        await asyncio.sleep(0.02)
    await starting
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, each)
    assert tokens(await read(engine, request())) == list(range(5))
    assert engine.restarts == 0
    await engine.close()


@pytest.mark.parametrize("max_tokens", [1, 10**5], ids=["idle", "busy"])
def test_an_orphan_ends(tmp_path: Path, max_tokens: int):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
        from engine.client_worker import WorkerEngine
        from engine.config import EngineConfig
        from engine.types import GenerateRequest, SamplingParams

        async def parent():
            engine = WorkerEngine(EngineConfig(target="ok"), {FACTORY!r})
            await engine.start()
            params = SamplingParams(max_tokens={max_tokens})
            async for _ in engine.generate(GenerateRequest(id="r", prompt_ids=(7,), params=params)):
                Path({str(tmp_path / "pid")!r}).write_text(str(engine.pid))
                os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            asyncio.run(parent())
        """)
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    # Nothing is captured: the orphan would hold the pipe, and waiting for its end would be the test.
    subprocess.run([sys.executable, str(script)], timeout=PATIENCE, env=environment)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + PATIENCE
    try:
        orphan = psutil.Process(pid)
        # Where process 1 reaps nobody's children, it stays a zombie.
        while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass  # it ended before we looked
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
