"""A load over several processes that begin together: one Python can read some thousand chunks a second."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from server.bench.load import Load, LoadStopped, Outcome, Share, drive


class ProcessDied(Exception):
    """A load process ended without a word."""


def send(load: Load, processes: int = 1) -> Outcome:
    """Warms up, then the load: what came back. Ctrl-C ends it with what there is (`interrupted`).

    Processes are spawned: a script that asks for more than one needs its `__main__` guard. Raises
    ValueError for numbers that cannot work, LoadStopped, ProcessDied.
    """
    load.check()
    most = load.streams if load.streams is not None else 64
    if not 1 <= processes <= most:
        raise ValueError(f"{processes} load processes for {most} streams")
    return _spread(load, processes) if processes > 1 else asyncio.run(drive(load))


def _spread(load: Load, processes: int) -> Outcome:
    spawn = multiprocessing.get_context("spawn")  # forking a process with CUDA in it breaks CUDA
    pipes: list[Connection] = []
    children = []
    try:
        for index in range(processes):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_child, args=(theirs, load, Share(index, processes)), daemon=True)
            child.start()
            theirs.close()  # so that a child that dies is noticed at our end
            children.append(child)
            pipes.append(ours)
        return _gathered(pipes)
    finally:
        for child in children:
            child.terminate()
            child.join()


def _gathered(pipes: Sequence[Connection]) -> Outcome:
    """Lets all begin when all are warm, and adds up what they give."""
    outcomes: dict[Connection, Outcome] = {}
    warm, interrupted = 0, False
    while missing := [pipe for pipe in pipes if pipe not in outcomes]:
        try:
            for pipe in wait(missing):
                assert isinstance(pipe, Connection)
                message = _result(pipe)
                if isinstance(message, Outcome):
                    outcomes[pipe] = message
                else:
                    warm += 1
                    if warm == len(pipes):
                        _tell(pipes, "go")
        except KeyboardInterrupt:
            interrupted = True
            _tell(missing, "stop")
    whole = Outcome(interrupted=interrupted)
    for outcome in outcomes.values():
        whole.add(outcome)
    return whole


def _tell(pipes: Sequence[Connection], word: str) -> None:
    for pipe in pipes:
        with suppress(OSError):  # it has ended meanwhile
            pipe.send(word)


def _child(pipe: Connection, load: Load, share: Share) -> None:
    """A load process: says "warm", waits for the word, then gives its outcome, or why it stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process passes it on

    async def run() -> Outcome:
        loop, go = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.current_task()
        assert task is not None

        def told() -> None:
            if pipe.recv() == "go":
                go.set()
            else:
                task.cancel()

        loop.add_reader(pipe.fileno(), told)

        async def warm() -> None:
            pipe.send("warm")
            await go.wait()

        try:
            return await drive(load, share, warm)
        finally:
            loop.remove_reader(pipe.fileno())

    try:
        pipe.send(asyncio.run(run()))
    except LoadStopped as stopped:
        pipe.send(stopped)


def _result(pipe: Connection) -> Any:
    """What a process sends next. Raises LoadStopped if it stopped, ProcessDied."""
    try:
        result = pipe.recv()
    except EOFError as error:
        raise ProcessDied("a load process died") from error
    if isinstance(result, LoadStopped):
        raise result
    return result
