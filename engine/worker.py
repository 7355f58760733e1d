"""The engine's loop, over any `Channel`: a thread's queues (`LocalEngine`) or the socket of a process of its
own (`WorkerEngine`; engine/worker_process.py).
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from engine.config import EngineConfig
from engine.heaps import Tidy
from engine.long_work import told
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
    Stop,
    ToEngine,
)
from engine.reading import Reading, Unread
from engine.types import CannotLoad, GenerateRequest, InvalidRequest, ModelInfo, StepStats, TokenEvent

log = logging.getLogger(__name__)

_READING = 0.005  # seconds that a loop without other work waits for a grammar between looks at its messages
_ALIVE = 0.25  # seconds between its signs of life meanwhile
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class EngineCore(Protocol):
    """What the loop needs of an engine. All calls come from one thread."""

    @property
    def info(self) -> ModelInfo: ...

    def add(self, request: GenerateRequest) -> None:
        """Takes the request in; raises InvalidRequest if it cannot be served, Unread if its grammar is to
        be read before."""
        ...

    def abort(self, request_id: str) -> None:
        """Drops the request without an event; an unknown id is a no-op."""
        ...

    def cut(self, request_id: str, n_tokens: int) -> None:
        """Drops the request, of which the first `n_tokens` tokens count; an unknown id is a no-op."""
        ...

    def has_work(self) -> bool: ...

    def step(self) -> tuple[list[TokenEvent], StepStats]: ...

    def close(self) -> None:
        """The last call, when the loop ends without a fault."""
        ...


EngineFactory = Callable[[EngineConfig], EngineCore]


class ClientGone(Exception):
    """The other end of the channel is no more: there is nobody to work for."""


class Channel(Protocol):
    """The loop's end of the line to its client. Both methods raise ClientGone."""

    def receive(self, wait: bool) -> Sequence[ToEngine]:
        """Every message that came; with `wait`, blocks a while if there is none."""
        ...

    def send(self, message: FromEngine) -> None: ...


def check_factory(path: str) -> None:
    """Raises ValueError unless `path` reads "package.module:name"."""
    if not _DOTTED.fullmatch(path):
        raise ValueError(f'engine factory {path!r} is not of the form "package.module:name"')


def import_factory(path: str) -> EngineFactory:
    """The engine's constructor named by "package.module:name"."""
    check_factory(path)
    module, _, name = path.partition(":")
    return cast(EngineFactory, getattr(importlib.import_module(module), name))


def serve(load: Callable[[], EngineCore], channel: Channel) -> bool:
    """Loads an engine and runs it until the client stops or leaves: True. False after a fault."""
    try:
        engine = load()
        info = engine.info
    except (CannotLoad, InvalidRequest) as error:  # a setting that cannot be served, told in one line
        channel.send(LoadFailed(str(error)))
        return False
    except Exception as error:
        advice = _advice(error)
        if advice is None:
            log.exception("the engine could not be loaded")
        channel.send(LoadFailed(advice or describe(error)))
        return False
    channel.send(Ready(info))
    loop = _Loop(engine, channel)
    try:
        try:
            with told(lambda begins: channel.send(Alive(unbounded=begins))):
                loop.run()
        except ClientGone:
            log.warning("the client is gone; the engine ends")
        engine.close()
    except Exception as error:
        # Nothing is known of the engine's state now, and a CUDA error outlives the call that met it.
        log.exception("the engine failed with %d requests open", len(loop.ids))
        channel.send(Fault(f"the engine failed: {describe(error)}"))
        return False
    finally:
        loop.reading.close()
    return True


def _advice(error: Exception) -> str | None:
    """What to do about it, if it is memory that ran out."""
    if "torch" not in sys.modules:  # nothing large was loaded
        return None
    from engine.memory_faults import advice, is_out_of_memory

    return advice(error) if is_out_of_memory(error) else None


class _Loop:
    """Messages in between steps, a step while there is work, one message out per step."""

    def __init__(self, engine: EngineCore, channel: Channel) -> None:
        self.engine, self.channel = engine, channel
        self.ids: dict[int, str] = {}  # open requests, by ticket
        self.tickets: dict[str, int] = {}  # and the way back
        self.reading = Reading()  # for some of these: the engine has not seen them yet
        self.left: list[int] = []  # tickets that their readers left since the last step
        self.tidy = Tidy()
        self.told = time.monotonic()  # when something was sent last, if it only waits for a grammar

    def run(self) -> None:
        """Returns when told to stop."""
        while True:
            for message in self.channel.receive(wait=not (self.engine.has_work() or self.reading.busy)):
                if isinstance(message, Stop):
                    return
                if isinstance(message, Add):
                    self.add(message)
                elif isinstance(message, Grammar):
                    self.reading.take(message.grammar)
                else:
                    self.leave(message)
            self.go_on_with_the_read()
            self.tidy.now_and_then()
            if self.engine.has_work():
                self.step()
            elif self.reading.busy and time.monotonic() - self.told > _ALIVE:
                self.told = time.monotonic()
                self.channel.send(Alive())

    def add(self, message: Add) -> None:
        ticket, request = message.ticket, message.request
        self.ids[ticket] = request.id  # before the engine sees it: a fault in `add` fails it too
        if request.id in self.tickets:
            self.refuse(message, InvalidRequest(f"a request with id {request.id!r} is being served", "id"))
            return
        self.tickets[request.id] = ticket
        self.enter(message)

    def enter(self, message: Add) -> None:
        """Gives the request to the engine, or puts it aside until its grammar is read."""
        try:
            self.engine.add(message.request)
        except InvalidRequest as error:
            self.refuse(message, error)
        except Unread as unread:
            if self.reading.wait_for(unread, message):
                self.channel.send(GrammarWanted(unread.key))

    def go_on_with_the_read(self) -> None:
        """Those whose grammar has been read since."""
        waiting, error = self.reading.finished(0.0 if self.engine.has_work() else _READING)
        for message in waiting:
            if error is None:
                self.enter(message)
            else:
                self.refuse(message, error)

    def refuse(self, message: Add, error: InvalidRequest) -> None:
        del self.ids[message.ticket]
        if self.tickets[message.request.id] == message.ticket:  # else the id is another one's
            del self.tickets[message.request.id]
        self.channel.send(Refused(message.ticket, error.message, error.param, error.code))

    def leave(self, message: Abort | Cut) -> None:
        request_id = self.ids.pop(message.ticket, None)
        if request_id is not None:
            del self.tickets[request_id]
            self.reading.leave(message.ticket)
            if isinstance(message, Cut):
                self.engine.cut(request_id, message.tokens)
            else:
                self.engine.abort(request_id)
        self.left.append(message.ticket)
        if not self.engine.has_work():
            self.step()  # without work it does nothing but tell that nothing runs any more

    def step(self) -> None:
        events, stats = self.engine.step()
        # An event of a request that is not open is the engine's fault: KeyError.
        tickets = [self.tickets[event.id] for event in events]
        left, self.left = self.left, []
        self.channel.send(Stepped(stats, tickets, events, left))
        for event in events:
            if event.finish_reason is not None:
                del self.ids[self.tickets.pop(event.id)]


def describe(error: Exception) -> str:
    """An error in one line, for people who do not see the traceback."""
    first = str(error).strip().partition("\n")[0]  # torch goes on with advice for its developers
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
