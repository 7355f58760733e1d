"""`WorkerEngine`: the engine in a process of its own, watched, and started again when it dies.

A CUDA fault poisons a process for good, and the event loop must not share the GIL with the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec

from engine.client_base import ClientBase
from engine.client_process import Worker
from engine.config import EngineConfig
from engine.messages import Add, Alive, Fault, LoadFailed, Ready, Stop, ToEngine, decode_from_engine, encode
from engine.types import EngineUnavailable, InvalidRequest
from engine.worker import check_factory, describe

log = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 5  # in a row, until a restart is given up
_SETTLED = 60.0  # seconds of service after which a death is a new trouble, not the old one again
_DRAIN = 0.25  # seconds without a message after which a dead process has said everything
_TICK = 1.0  # seconds between looks at a silent process, at most


class WorkerEngine(ClientBase):
    """The engine in a supervised process.

    `factory` names the engine's constructor, "package.module:name". `restart_delay`: seconds
    before the first restart; doubled by each one, up to `longest_delay`, until the engine settles.
    `grace`: seconds it may take to end when closed, then it is killed. `step_timeout`: seconds of
    silence with requests open after which the process counts as hung and is killed; after half of
    them it is "stalled", and takes no requests until it speaks again. Loading has no bound, as it
    may download, nor has what the process says to have none (capturing graphs); `close` ends both.
    `log_formatter` writes the process's log lines; None: as text.
    """

    def __init__(
        self,
        config: EngineConfig,
        factory: str = "engine.core:Engine",
        *,
        restart_delay: float = 1.0,
        longest_delay: float = 30.0,
        grace: float = 5.0,
        step_timeout: float = 300.0,
        log_formatter: logging.Formatter | None = None,
    ) -> None:
        super().__init__()
        check_factory(factory)
        self._config, self._factory = config, factory
        self._restart_delay, self._longest_delay = restart_delay, longest_delay
        self._grace, self._step_timeout = grace, step_timeout
        self._tick = min(_TICK, step_timeout / 8)
        self._log_formatter = log_formatter
        self._worker: Worker | None = None
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
        try:
            await self._keep_running()
        except Exception as error:
            log.exception("the supervision of the engine process failed")
            self._lose("dead", f"the engine process cannot be supervised: {describe(error)}")
        finally:
            if self._worker is not None:  # cancelled, with the whole event loop as a rule
                self._worker.destroy()
                self._worker = None
            self._settled.set()

    async def _keep_running(self) -> None:
        failed_starts, delay = 0, self._restart_delay
        while True:
            why, served = await self._live()
            if self._closing.is_set():
                return
            failed_starts = failed_starts + 1 if served is None else 0
            if served is None and (self._info is None or failed_starts == _MAX_FAILED_STARTS):
                log.error("%s; given up", why)
                self._lose("dead", why)
                return
            if served is not None and served > _SETTLED:
                delay = self._restart_delay
            log.error("%s; started again in %.1f s", why, delay)
            self._lose("restarting", f"{why}; it is being restarted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)
                return
            delay = min(2 * delay, self._longest_delay)
            self._restarts += 1

    async def _live(self) -> tuple[str, float | None]:
        """One process from start to end: why it ended, and how many seconds it served; None: it never did."""
        try:
            worker = self._worker = Worker(self._config, self._factory, self._log_formatter)
        except Exception as error:  # of the system, which may be short of anything for a moment
            return f"the engine process cannot be started: {describe(error)}", None
        try:
            await self._attend(worker)
            if self._state in ("ready", "stalled"):  # its waiters are told once it has said all
                self._state, self._why = "restarting", "its process ends"
            await self._bury(worker)
        except Exception as error:  # of its line or of us: the next one has a line of its own
            log.exception("the engine process cannot be attended")
            why = f"the engine process could not be attended: {describe(error)}"
            worker.last_words = worker.last_words or why
        worker.destroy()
        self._worker = None
        ready_at = worker.ready_at
        return worker.why, None if ready_at is None else asyncio.get_running_loop().time() - ready_at

    async def _attend(self, worker: Worker) -> None:
        """Takes in what the process says until it has ended, or must end."""
        clock = asyncio.get_running_loop().time
        closing = asyncio.ensure_future(self._closing.wait())
        looked = clock()
        try:
            while not closing.done() and worker.alive() and not worker.last_words:
                causes: set[asyncio.Future[Any]] = {worker.inbox, worker.died, closing}
                await asyncio.wait(causes, timeout=self._tick, return_when=asyncio.FIRST_COMPLETED)
                before, looked = looked, clock()
                if worker.inbox.done():
                    self._take(worker)
                else:  # a time in which this process was stopped itself is nobody's silence
                    self._watch(worker, min(looked - before, 2 * self._tick))
        finally:
            closing.cancel()

    def _watch(self, worker: Worker, seconds: float) -> None:
        """The process has said nothing for that much longer."""
        if worker.unbounded or not (self._streams or self._leaving):  # nobody waits, nor did and left
            worker.silence = 0.0
            return
        worker.silence += seconds
        if worker.silence > self._step_timeout:
            worker.last_words = f"the engine process hung: no step for {self._step_timeout:g} s"
            worker.process.kill()
        elif worker.silence > self._step_timeout / 2 and self._state == "ready":
            self._state, self._why = "stalled", f"no step for {worker.silence:.3g} s"
            log.warning("the engine is stalled: %s; ended after %g s", self._why, self._step_timeout)

    def _take(self, worker: Worker) -> None:
        """One message of the process. What cannot be read, or delivered, ends it."""
        data = worker.inbox.result()
        worker.inbox = worker.receive()
        worker.silence = 0.0
        try:
            message = decode_from_engine(data)
            if self._state == "stalled":
                self._state, self._why = "ready", ""
                log.warning("the engine goes on")
            self._deliver(message)
        except Exception as error:
            log.exception("a message of the engine's process could not be taken")
            worker.last_words = f"a message of the engine could not be taken: {describe(error)}"
            worker.process.kill()
            return
        worker.unbounded = isinstance(message, Alive) and message.unbounded
        if isinstance(message, Ready):
            worker.ready_at = asyncio.get_running_loop().time()
            self._settled.set()
        elif isinstance(message, LoadFailed | Fault):
            worker.last_words = self._why

    async def _bury(self, worker: Worker) -> None:
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
