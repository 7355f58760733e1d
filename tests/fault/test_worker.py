"""The engine's process: everything that can befall it, and what its waiters then hear."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from engine.client_worker import WorkerEngine
from engine.config import EngineConfig
from engine.types import (
    EngineUnavailable,
    InvalidRequest,
    StepStats,
    TokenEvent,
)
from server.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from scripted_engine import (
    HANG,
    KILL,
    REFUSE,
    SLOW,
)
from worker_support import FACTORY, PATIENCE, read, request, tokens, until


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
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(engine.pid, each)
        await asyncio.sleep(0.02)
    await starting
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(engine.pid, each)
    assert tokens(await read(engine, request())) == list(range(5))
    assert engine.restarts == 0
    await engine.close()


def test_no_process_of_the_server_ends_by_a_signal_to_its_group(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, os, signal, sys
        import psutil
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
        from engine.client_worker import WorkerEngine
        from engine.config import EngineConfig

        async def parent():
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, lambda *_: None)
            engine = WorkerEngine(EngineConfig(target="ok"), {FACTORY!r})
            await engine.start()
            children = psutil.Process().children()
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.killpg(os.getpid(), each)
            await asyncio.sleep(1.0)
            print(len(children), sum(child.status() == psutil.STATUS_ZOMBIE for child in children))
            await engine.close()

        if __name__ == "__main__":
            asyncio.run(parent())
        """)
    )
    done = subprocess.run(
        [sys.executable, script], start_new_session=True, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2 0"), done.stderr  # the engine, Python's tracker


@pytest.mark.parametrize(
    ("max_tokens", "stopped"), [(1, False), (10**5, False), (1, True)], ids=["idle", "busy", "stopped"]
)
def test_an_orphan_ends(tmp_path: Path, max_tokens: int, stopped: bool):
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
                if {stopped}:
                    os.kill(engine.pid, signal.SIGSTOP)
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
