"""How the server ends: it lets nobody in any more, answers what is open, then says why it does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Iterator
from types import FrameType
from typing import Protocol

from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from server import http1
from server.context import Context

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LEAVE_SECONDS = 1.0  # of the late ones' time, for answers to end whose clients do not read


class Process(Protocol):
    """An engine that can be ended at once."""

    @property
    def pid(self) -> int | None: ...

    def close(self) -> Awaitable[None]: ...


class Server(http1.Server):
    """The HTTP server, until a signal ends it. After the first one it still listens, to say so: /ready and
    new requests are answered 503, and open answers may go on for `shutdown_seconds`; those left are told that
    they end. A second one ends it at once, a third one without asking it.

    `exit_code`: 0 after SIGTERM, 130 after SIGINT, and after a second signal 128 and its number.
    """

    def __init__(
        self, app: FastAPI, shutdown_seconds: float, engine: Process, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(app, 0.0, late=engine.close, tls=tls)
        context: Context = app.state.context
        self._door, self._engine, self._grace = context.door, engine, shutdown_seconds
        self._asked = self._told = self._left = False
        self._until: float | None = None  # the end of the grace, by `time.monotonic`, once it drains
        self.exit_code = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but what was heeded is not raised again: the exit code says what came of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            self.exit_code = 0 if sig == signal.SIGTERM else 128 + sig
            return
        self.force_exit = True
        self.exit_code = 128 + sig
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._loop.call_soon_threadsafe(self._end_engine)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every tenth of a second: whether to stop listening."""
        over = await super().on_tick(counter)
        if over or self.force_exit or not self._asked:
            return over or self.force_exit
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._grace
            self._begin()
        if self.server_state.tasks and now >= self._until and not self._told:
            self._told = True
            log.warning("%d requests did not end in time: they are told so", len(self.server_state.tasks))
            self._door.stop_all()
        if now >= self._last_word and not self._left:
            self._left = True
            self._leave()
        return not self.server_state.tasks or now >= self._until + http1.LATE_SECONDS

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nothing is answered any more; what was, and is not yet read, has what is left of the time."""
        leaving = asyncio.get_running_loop().call_later(self._last_word - time.monotonic(), self._leave)
        try:
            await super().shutdown(sockets)
        finally:
            leaving.cancel()

    @property
    def _last_word(self) -> float:
        """When those that do not read are left."""
        since = time.monotonic() if self._until is None else self._until
        return since + http1.LATE_SECONDS - _LEAVE_SECONDS

    def _begin(self) -> None:
        self._door.draining = True
        open_requests = len(self.server_state.tasks)
        log.info("shutting down; %d open requests have %g s to end", open_requests, self._grace)
        for connection in list(self.server_state.connections):
            cycle = connection.cycle if isinstance(connection, H11Protocol) else None  # a handshake has none
            if cycle is not None and not cycle.response_complete:
                connection.shutdown()  # after this answer; a request that has not come whole is refused

    def _leave(self) -> None:
        """Those that were told and do not read it: without their connections, their answers end."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _end_engine(self) -> None:
        """Closed first, so that its death is none to recover from."""
        self._closing = self._loop.create_task(_closed(self._engine))
        if (pid := self._engine.pid) is not None:
            self._loop.call_soon(_kill, pid)

    async def left_at_once(self) -> None:
        """Returns when the engine is gone, after a second signal."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing, 2.0)


async def _closed(engine: Process) -> None:
    await engine.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
