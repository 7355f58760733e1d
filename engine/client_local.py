"""`LocalEngine`: the engine on a thread of this process, for tests, notebooks and `generate`.

`ClientBase` is what it shares with `WorkerEngine`: who waits for which events.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from engine.client import EngineState
from engine.config import EngineConfig
from engine.messages import (
    Abort,
    Add,
    Fault,
    FromEngine,
    Grammar,
    GrammarWanted,
    LoadFailed,
    Ready,
    Refused,
    Stepped,
    Stop,
    ToEngine,
    unburdened,
)
from engine.types import EngineUnavailable, GenerateRequest, InvalidRequest, ModelInfo, StepStats, TokenEvent
from engine.validate import validate
from engine.worker import ClientGone, EngineCore, EngineFactory, import_factory, serve

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds; the longest the thread sleeps without looking whether the event loop lives

StepListener = Callable[[StepStats, list[TokenEvent]], None]


class _Stream:
    """The events of one open request on their way to its reader, and how it ends otherwise."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request_id = request.id
        self.grammar = request.params.grammar
        self.items: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()


class ClientBase:
    """The half of an `EngineClient` that does not care where the engine runs.

    A subclass delivers what the engine says (`_deliver`), says when the engine is gone (`_lose`),
    and carries messages to it (`_send`, which may raise InvalidRequest for an `Add`).
    """

    def __init__(self) -> None:
        self._state: EngineState = "loading"
        self._why = "it was not started"  # the reason of a state other than "ready"
        self._info: ModelInfo | None = None
        self._restarts = 0
        self._streams: dict[int, _Stream] = {}  # open requests, by ticket
        self._open_ids: set[str] = set()
        self._tickets = itertools.count(1)
        self._listeners: list[StepListener] = []

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    @property
    def restarts(self) -> int:
        """Times the engine was started anew after a death."""
        return self._restarts

    @property
    def info(self) -> ModelInfo:
        """The loaded models. Raises EngineUnavailable before the first time the engine was ready."""
        if self._info is None:
            raise self._unavailable()
        return self._info

    def on_step(self, listener: StepListener) -> None:
        """Calls `listener` on the event loop after every step with its statistics and events."""
        self._listeners.append(listener)

    async def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest if the engine would refuse the request. Runs nothing."""
        validate(request, self.info)
        if request.id in self._open_ids:
            raise InvalidRequest(f"a request with id {request.id!r} is being served", "id")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request, ending with the one that has a finish_reason.

        Raises InvalidRequest or EngineUnavailable, as `EngineClient.generate` says. Leaving early
        aborts the request.
        """
        await self.check(request)
        if self._state != "ready":
            raise self._unavailable()
        ticket = next(self._tickets)
        self._send(Add(ticket, unburdened(request)))
        stream = self._streams[ticket] = _Stream(request)
        self._open_ids.add(request.id)
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._pop(ticket) is not None:  # the reader left before the end
                self._send(Abort(ticket))

    def _send(self, message: ToEngine) -> None:
        raise NotImplementedError

    def _deliver(self, message: FromEngine) -> None:
        """Takes one message of the engine, on the event loop."""
        if isinstance(message, Stepped):
            self._deliver_step(message)
        elif isinstance(message, Refused):
            self._end(message.ticket, InvalidRequest(message.message, message.param, message.code))
        elif isinstance(message, GrammarWanted):
            self._hand_over(message.key)
        elif isinstance(message, Ready):
            self._info, self._state, self._why = message.info, "ready", ""
        elif isinstance(message, LoadFailed):
            self._why = f"the engine could not be loaded: {message.reason}"
        else:
            self._deliver_fault(message)

    def _deliver_step(self, message: Stepped) -> None:
        for ticket, event in zip(message.tickets, message.events, strict=True):
            # A request that its reader left has no stream: the rest of its events is nobody's.
            if (stream := self._streams.get(ticket)) is not None:
                stream.items.put_nowait(event)
                if event.finish_reason is not None:
                    self._pop(ticket)
        for listener in self._listeners:
            try:
                listener(message.stats, message.events)
            except Exception:  # whoever counts must not stop those who read
                log.exception("a step listener failed")

    def _hand_over(self, key: str) -> None:
        """Sends a grammar once for all that wait for it; none if they have left."""
        for stream in self._streams.values():
            if stream.grammar is not None and stream.grammar.key == key:
                self._send(Grammar(stream.grammar))
                return

    def _deliver_fault(self, message: Fault) -> None:
        self._why = message.reason
        for ticket in message.tickets:
            if (stream := self._streams.get(ticket)) is not None:
                event = TokenEvent(id=stream.request_id, finish_reason="error", error=message.reason)
                self._end(ticket, event)

    def _lose(self, state: EngineState, why: str) -> None:
        """The engine is gone: fails every open request."""
        self._state, self._why = state, why
        for ticket in list(self._streams):
            self._end(ticket, EngineUnavailable(why))

    def _end(self, ticket: int, item: TokenEvent | Exception) -> None:
        """Gives an open request its last item."""
        if (stream := self._pop(ticket)) is not None:
            stream.items.put_nowait(item)

    def _pop(self, ticket: int) -> _Stream | None:
        stream = self._streams.pop(ticket, None)
        if stream is not None:
            self._open_ids.remove(stream.request_id)
        return stream

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(f"the engine is {self._state}: {self._why}")


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
