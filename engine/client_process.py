"""One process of an engine and the socket to it, as `WorkerEngine` sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal

import zmq
import zmq.asyncio

from engine import group_signals
from engine.config import EngineConfig
from engine.memory_faults import oom_kills
from engine.socket_folder import socket_folder
from engine.worker_process import main

log = logging.getLogger(__name__)

_FILES = 16  # more than a start opens
_REAP = 10.0  # seconds for the system to end a killed process


class Worker:
    """Starts the process, with a folder and a socket of its own. Raises what the system has against it."""

    def __init__(self, config: EngineConfig, factory: str, log_formatter: logging.Formatter | None) -> None:
        loop = asyncio.get_running_loop()
        _check_files()
        with contextlib.ExitStack() as made:  # taken back if something fails
            endpoint = f"ipc://{made.enter_context(socket_folder())}/0"
            context = zmq.asyncio.Context()
            made.callback(context.destroy, linger=0)
            self.socket = context.socket(zmq.PAIR)
            self.socket.setsockopt(zmq.SNDHWM, 0)  # requests are few: sending never waits
            # The process binds it: short of file descriptors, a binder of ZeroMQ aborts, who connects waits.
            self.socket.connect(endpoint)
            level = logging.getLogger("engine").getEffectiveLevel()
            arguments = (endpoint, config, factory, level, log_formatter)
            self.process = multiprocessing.get_context("spawn").Process(
                target=main, args=arguments, name="disco-engine", daemon=True
            )
            self.exit = ""  # how it ended
            self._oom_kills, self._reap = oom_kills(), _REAP
            with group_signals.blocked():
                self.process.start()
            made.callback(self._end)
            self.ready_at: float | None = None  # the event loop's time
            self.silence = 0.0  # seconds that somebody has waited for its next word
            self.unbounded = False  # it said that its next word may take any time
            self.last_words = ""  # why it ends, if it could say so
            self.died: asyncio.Future[None] = loop.create_future()
            self.inbox = self.receive()
            loop.add_reader(self.process.sentinel, self._on_death)
            self._made = made.pop_all()

    @property
    def why(self) -> str:
        """Why there is no engine any more, once the process is destroyed."""
        return self.last_words or f"the engine process died ({self.exit})"

    def receive(self) -> asyncio.Future[bytes]:
        return asyncio.ensure_future(self.socket.recv())  # it is a future already

    def send(self, data: bytes) -> None:
        # The future is done at once; if the process has died under it, it goes with the socket.
        self.socket.send(data)

    def alive(self) -> bool:
        """Asks the system: a child of the process may hold the sentinel open beyond its death."""
        return not self.died.done() and self.process.is_alive()

    async def ended(self, grace: float) -> None:
        """Waits for the end of the process for `grace` seconds, then kills it and waits for what that takes,
        since one that waits for a device may not die at once."""
        loop = asyncio.get_running_loop()
        deadline, killed = loop.time() + grace, False
        while self.process.is_alive():
            if loop.time() > deadline and killed:
                self._reap = 0.0
                return
            if loop.time() > deadline:
                log.error("the engine process does not end: killed")
                self.process.kill()
                deadline, killed = loop.time() + _REAP, True
            await asyncio.sleep(0.01)

    def destroy(self) -> None:
        """Ends the process, reaps it, and closes the socket."""
        self._made.close()
        self.inbox.cancel()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.kill()
        self.process.join(self._reap)
        code = self.process.exitcode
        if code is None:
            log.error("the engine process %s cannot be killed", self.process.pid)
        else:
            self.exit = self._told(code)
            self.process.close()

    def _told(self, code: int) -> str:
        if code >= 0:
            return f"exit code {code}"
        if -code == signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"signal {-code}: killed by the system, which was out of memory"
        return f"signal {-code}"

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.died.set_result(None)


def _check_files() -> None:
    """Raises OSError unless enough files can be opened for a start: ZeroMQ, short of one, aborts."""
    opened: list[int] = []
    try:
        while len(opened) < _FILES:
            opened += os.pipe()
    finally:
        for each in opened:
            os.close(each)
