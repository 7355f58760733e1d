"""Who waits for which events: the half of an engine client that does not care where the engine runs."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable

import msgspec

from engine.client import EngineState
from engine.messages import (
    Abort,
    Add,
    Alive,
    Cut,
    Fault,
    FromEngine,
    Grammar,
    GrammarWanted,
    LoadFailed,
    Ready,
    Refused,
    Stepped,
    ToEngine,
    unburdened,
)
from engine.types import EngineUnavailable, GenerateRequest, InvalidRequest, ModelInfo, StepStats, TokenEvent
from engine.validate import validate

log = logging.getLogger(__name__)

StepListener = Callable[[StepStats, list[TokenEvent]], None]


class _Stream:
    """The events of one open request on their way to its reader, and how it ends otherwise."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request_id = request.id
        self.grammar = request.params.grammar
        self.items: asyncio.Queue[TokenEvent | Exception | None] = asyncio.Queue()  # None: it was cut


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
        self._open: dict[str, int] = {}  # the tickets of their ids
        self._leaving: dict[int, str] = {}  # tickets that were left, until the engine has let go of them
        self._tickets = itertools.count(1)
        self._listeners: list[StepListener] = []

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    @property
    def why(self) -> str:
        """Why it is in a state other than "ready", in one line; "" if it is ready."""
        return self._why

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
        if request.id in self._open:
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
        self._open[request.id] = ticket
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    return
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._pop(ticket) is not None:  # the reader left before the end
                self._leave(request.id, Abort(ticket))

    def cut(self, request_id: str, n_tokens: int) -> None:
        """Ends an open request of which the first `n_tokens` tokens count; see `EngineClient.cut`."""
        ticket = self._open.get(request_id)
        if ticket is not None:
            self._end(ticket, None)
            self._leave(request_id, Cut(ticket, n_tokens))

    def _leave(self, request_id: str, message: Abort | Cut) -> None:
        self._leaving[message.ticket] = request_id
        self._send(message)

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
        elif isinstance(message, Fault):
            self._why = message.reason
        else:
            assert isinstance(message, Alive)

    def _deliver_step(self, message: Stepped) -> None:
        for ticket, event in zip(message.tickets, message.events, strict=True):
            # A request that its reader left has no stream: the rest of its events is nobody's.
            if (stream := self._streams.get(ticket)) is not None:
                stream.items.put_nowait(event)
                if event.finish_reason is not None:
                    self._pop(ticket)
        left = tuple(self._leaving.pop(ticket) for ticket in message.left)
        stats = msgspec.structs.replace(message.stats, left=left) if left else message.stats
        for listener in self._listeners:
            try:
                listener(stats, message.events)
            except Exception:  # whoever counts must not stop those who read
                log.exception("a step listener failed")

    def _hand_over(self, key: str) -> None:
        """Sends a grammar once for all that wait for it; none if they have left."""
        for stream in self._streams.values():
            if stream.grammar is not None and stream.grammar.key == key:
                self._send(Grammar(stream.grammar))
                return

    def _lose(self, state: EngineState, why: str) -> None:
        """The engine is gone: fails every open request."""
        self._state, self._why = state, why
        self._leaving.clear()
        for ticket in list(self._streams):
            self._end(ticket, EngineUnavailable(why))

    def _end(self, ticket: int, item: TokenEvent | Exception | None) -> None:
        """Gives an open request its last item."""
        if (stream := self._pop(ticket)) is not None:
            stream.items.put_nowait(item)

    def _pop(self, ticket: int) -> _Stream | None:
        stream = self._streams.pop(ticket, None)
        if stream is not None:
            del self._open[stream.request_id]
        return stream

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(f"the engine is {self._state}: {self._why}")
