"""`LocalEngine`: the engine on a thread of this process, for tests, notebooks and `generate`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from engine.client_base import ClientBase
from engine.config import EngineConfig
from engine.messages import FromEngine, Ready, Stop, ToEngine
from engine.types import EngineUnavailable
from engine.worker import ClientGone, EngineCore, EngineFactory, import_factory, serve

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds; the longest the thread sleeps without looking whether the event loop lives


class LocalEngine(ClientBase):
    """The engine on a thread of this process. A fault makes it "dead": it is not restarted.

    `factory` makes the engine of a config, on that thread; by default `engine.core.Engine`.
    `close` waits for the step under way, at most `grace` seconds: a thread cannot be killed.
    """

    def __init__(
        self, config: EngineConfig, factory: EngineFactory | None = None, *, grace: float = 30.0
    ) -> None:
        super().__init__()
        self._config, self._factory, self._grace = config, factory, grace
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Loads the engine and returns when it is ready; raises EngineUnavailable if it cannot load."""
        if self._thread is not None or self._state == "closed":
            raise RuntimeError("an engine client is started once")
        self._loop = asyncio.get_running_loop()
        self._loaded = asyncio.Event()
        self._ended = asyncio.Event()
        self._why = "the models are being loaded"
        # A daemon: an engine left open must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        await self._loaded.wait()
        if self._state != "ready":
            raise EngineUnavailable(self._why)

    async def close(self) -> None:
        """Ends the engine; open requests get EngineUnavailable. Idempotent."""
        self._lose("closed", "the engine was closed")
        if self._thread is None:
            return
        self._loaded.set()
        self._inbox.put(Stop())
        try:
            await asyncio.wait_for(self._ended.wait(), self._grace)
        except TimeoutError:
            log.error("the engine's thread does not end: it is left behind")

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def _run(self) -> None:
        """The thread."""
        channel = _QueueChannel(self._inbox, self._loop, self._take)
        with contextlib.suppress(ClientGone):  # the event loop was closed: nobody is left to tell
            serve(self._load, channel)
            channel.post(self._gone)

    def _load(self) -> EngineCore:
        factory = self._factory or import_factory("engine.core:Engine")
        return factory(self._config)

    def _take(self, message: FromEngine) -> None:
        if self._state == "closed":
            return
        self._deliver(message)
        if isinstance(message, Ready):
            self._loaded.set()

    def _gone(self) -> None:
        if self._state != "closed":
            self._lose("dead", self._why)
        self._loaded.set()
        self._ended.set()


class _QueueChannel:
    """The thread's end: a queue in, callbacks on the event loop out."""

    def __init__(
        self,
        inbox: queue.SimpleQueue[ToEngine],
        loop: asyncio.AbstractEventLoop,
        take: Callable[[FromEngine], None],
    ) -> None:
        self.inbox, self.loop, self.take = inbox, loop, take

    def receive(self, wait: bool) -> Sequence[ToEngine]:
        if self.loop.is_closed():
            raise ClientGone
        messages: list[ToEngine] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self.inbox.get(block=wait, timeout=_POLL if wait else None))
            while True:
                messages.append(self.inbox.get_nowait())
        return messages

    def send(self, message: FromEngine) -> None:
        self.post(self.take, message)

    def post(self, callback: Callable[..., None], *args: FromEngine) -> None:
        """Calls back on the event loop. Raises ClientGone if that is closed."""
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError as error:
            raise ClientGone from error
