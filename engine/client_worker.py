"""`WorkerEngine`: the engine in a process of its own, watched, and started again when it dies.

A CUDA fault poisons a process for good, and the event loop must not share the GIL with the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from engine.client_base import ClientBase
from engine.config import EngineConfig
from engine.messages import Add, Fault, LoadFailed, Ready, Stop, ToEngine, decode_from_engine, encode
from engine.types import EngineUnavailable, InvalidRequest
from engine.worker import check_factory, describe, main

log = logging.getLogger(__name__)

_MAX_FAILED_LOADS = 5  # in a row, until a restart is given up
_MAX_DELAY = 30.0  # seconds between restarts, at most
_SETTLED = 60.0  # seconds of service after which a death is a new trouble, not the old one again
_DRAIN = 0.25  # seconds without a message after which a dead process has said everything
_REAP = 10.0  # seconds for the system to end a killed process
_TICK = 1.0  # seconds between looks at a silent process


class WorkerEngine(ClientBase):
    """The engine in a supervised process.

    `factory` names the engine's constructor, "package.module:name". `restart_delay`: seconds
    before the first restart; doubled by each one until the engine settles. `grace`: seconds it
    may take to end when closed, then it is killed. `step_timeout`: seconds of silence with
    requests open after which the process counts as hung and is killed. Loading has no bound, as
    it may download; `close` ends it. `log_formatter` writes the process's log lines; None: as text.
    """

    def __init__(
        self,
        config: EngineConfig,
        factory: str = "engine.core:Engine",
        *,
        restart_delay: float = 1.0,
        grace: float = 5.0,
        step_timeout: float = 300.0,
        log_formatter: logging.Formatter | None = None,
    ) -> None:
        super().__init__()
        check_factory(factory)
        self._config, self._factory = config, factory
        self._restart_delay, self._grace, self._step_timeout = restart_delay, grace, step_timeout
        self._log_formatter = log_formatter
        self._worker: _Worker | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the engine; None while there is no process."""
        return self._worker.process.pid if self._worker else None

    async def start(self) -> None:
        """Starts the process and returns when it is ready; raises EngineUnavailable if it cannot load."""
        if self._supervisor is not None or self._state == "closed":
            raise RuntimeError("an engine client is started once")
        self._closing = asyncio.Event()
        self._settled = asyncio.Event()  # ready for the first time, or never to be
        self._why = "the models are being loaded"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        await self._settled.wait()
        if self._state != "ready":
            raise EngineUnavailable(self._why)

    async def close(self) -> None:
        """Ends the process; open requests get EngineUnavailable. Idempotent."""
        self._lose("closed", "the engine was closed")
        if self._supervisor is not None:
            self._closing.set()
            await asyncio.shield(self._supervisor)

    def _send(self, message: ToEngine) -> None:
        try:
            data = encode(message)
        except (msgspec.EncodeError, OverflowError, TypeError, UnicodeEncodeError) as error:
            if not isinstance(message, Add):
                raise
            raise InvalidRequest(f"the request cannot be carried to the engine: {error}") from error
        if self._worker is None:
            raise self._unavailable()
        self._worker.send(data)

    async def _supervise(self) -> None:
        """The supervisor's task: while the client is open there is a process, or soon will be."""
        context = zmq.asyncio.Context()
        folder = tempfile.mkdtemp(prefix="disco-engine-")  # only this user may enter it
        try:
            await self._keep_running(context, folder)
        except Exception as error:
            log.exception("the supervision of the engine process failed")
            self._lose("dead", f"the engine process cannot be supervised: {describe(error)}")
        finally:
            if self._worker is not None:  # cancelled, with the whole event loop as a rule
                self._worker.destroy()
                self._worker = None
            self._settled.set()
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _keep_running(self, context: zmq.asyncio.Context, folder: str) -> None:
        clock, failed_loads, delay = asyncio.get_running_loop().time, 0, self._restart_delay
        while True:
            endpoint = f"ipc://{folder}/{self._restarts}"
            worker = self._worker = _Worker(
                context, endpoint, self._config, self._factory, self._log_formatter
            )
            await self._attend(worker)
            await self._bury(worker)
            self._worker = None
            if self._closing.is_set():
                return
            failed_loads = failed_loads + 1 if worker.ready_at is None else 0
            if worker.ready_at is None and (self._info is None or failed_loads == _MAX_FAILED_LOADS):
                log.error("%s; given up", worker.why)
                self._lose("dead", worker.why)
                return
            if worker.ready_at is not None and clock() - worker.ready_at > _SETTLED:
                delay = self._restart_delay
            log.error("%s; started again in %.1f s", worker.why, delay)
            self._lose("restarting", f"{worker.why}; it is being restarted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)
                return
            delay = min(2 * delay, _MAX_DELAY)
            self._restarts += 1

    async def _attend(self, worker: _Worker) -> None:
        """Takes in what the process says until it has ended, or must end."""
        clock = asyncio.get_running_loop().time
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while not closing.done() and worker.alive() and not worker.last_words:
                causes: set[asyncio.Future[Any]] = {worker.inbox, worker.died, closing}
                await asyncio.wait(causes, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
                if worker.inbox.done():
                    self._take(worker)
                elif not self._streams:
                    worker.heard_at = clock()  # nobody waits: the silence counts from the next request
                elif clock() - worker.heard_at > self._step_timeout:
                    worker.last_words = f"the engine process hung: no step for {self._step_timeout:g} s"
                    worker.process.kill()
        finally:
            closing.cancel()

    def _take(self, worker: _Worker) -> None:
        """One message of the process."""
        message = decode_from_engine(worker.inbox.result())
        worker.inbox = worker.receive()
        worker.heard_at = asyncio.get_running_loop().time()
        self._deliver(message)
        if isinstance(message, Ready):
            worker.ready_at = worker.heard_at
            self._settled.set()
        elif isinstance(message, LoadFailed | Fault):
            worker.last_words = self._why

    async def _bury(self, worker: _Worker) -> None:
        """Sees to it that the process has ended, and hears what it still had to say."""
        if self._closing.is_set():
            if worker.ready_at is None:  # loading, it would not listen
                worker.process.kill()
            else:
                worker.send(encode(Stop()))
        await worker.ended(self._grace)
        while not self._closing.is_set():
            await asyncio.wait({worker.inbox}, timeout=_DRAIN)
            if not worker.inbox.done():
                break
            self._take(worker)
        worker.destroy()


class _Worker:
    """One process and the socket to it. Raises OSError if it cannot be started."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        config: EngineConfig,
        factory: str,
        log_formatter: logging.Formatter | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # requests are few: sending never waits
        self.socket.bind(endpoint)
        level = logging.getLogger().getEffectiveLevel()
        arguments = (endpoint, config, factory, level, log_formatter)
        self.process = multiprocessing.get_context("spawn").Process(
            target=main, args=arguments, name="disco-engine", daemon=True
        )
        with _signals_blocked():
            self.process.start()
        self.ready_at: float | None = None  # the event loop's time
        self.heard_at = loop.time()  # when it last spoke, or had nothing to say
        self.last_words = ""  # why it ends, if it could say so
        self.exit = ""  # how it ended
        self.died: asyncio.Future[None] = loop.create_future()
        self.inbox = self.receive()
        loop.add_reader(self.process.sentinel, self._on_death)

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
        """Waits for the end of the process for `grace` seconds, then kills it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while self.process.is_alive():
            if loop.time() > deadline:
                log.error("the engine process does not end: killed")
                self.process.kill()
                return
            await asyncio.sleep(0.01)

    def destroy(self) -> None:
        """Ends the process, reaps it, and closes the socket."""
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.kill()
        self.process.join(_REAP)
        code = self.process.exitcode
        if code is None:
            log.error("the engine process %s cannot be killed", self.process.pid)
        else:
            self.exit = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.process.close()
        self.inbox.cancel()
        self.socket.close(linger=0)

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.died.set_result(None)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started herein is deaf to what may reach the whole group from its first instruction on."""
    resource_tracker.ensure_running()  # it would start in `Process.start` and lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
