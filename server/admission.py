"""Who is let in: a bounded queue, what each key may take, nobody once the server ends; and until when.

A request holds a `Ticket` from its headers to the end of its answer. A full queue is told before a body is
read. Once the body is there it keeps a place for one sequence; what it asks for is known later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import msgspec

from engine.types import GenerateRequest, StepStats, TokenEvent
from server.errors import ApiError, deadline_passed, shutting_down, too_many
from server.key_limits import Limits, Share
from server.metrics_admission import AdmissionMetrics

_REMEMBERED = 128  # sequences that began lately: how fast the queue moves
_LATELY = 30.0  # seconds

Stop = Callable[[ApiError], None]


@dataclass(eq=False)
class Ticket:
    """One request's leave to be here. `due`: when it must be answered, by `time.monotonic`; None: never."""

    admission: Admission
    share: Share
    generates: bool  # it asks for sequences
    due: float | None = None
    reserved: bool = False  # a place in the queue, until its sequences are known
    held: int = 0  # bytes of its body, if that is large
    ids: list[str] = field(default_factory=list)  # of its sequences
    stops: set[Stop] = field(default_factory=set)

    def enter(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """The request's sequences join the queue, on behalf of its key. Raises ApiError 429."""
        self.admission.queue_up(self, requests)
        salt = f"{self.tenant}\0" if self.admission.apart else ""  # no key's name has a zero in it
        return [
            msgspec.structs.replace(request, tenant=self.tenant, cache_salt=salt + request.cache_salt)
            for request in requests
        ]

    def hold(self, size: int) -> None:
        """Its body has so many bytes by now. Raises ApiError 429."""
        self.admission.hold(self, size)

    def release_body(self) -> None:
        """Its body was read, or is not waited for."""
        self.admission.release_body(self)

    def reserve(self) -> None:
        """Its body has come: it keeps a place in the queue. Raises ApiError 429."""
        if self.generates:
            self.admission.reserve(self)

    def left(self, ident: str) -> None:
        """One of its sequences has ended, or is given up."""
        self.admission.left(ident)

    @property
    def tenant(self) -> str:
        """The name of the key that it came with; "" where no key is needed."""
        return self.share.name or ""

    @property
    def seconds_left(self) -> float | None:
        """Until it is due; None: no end."""
        return None if self.due is None else max(0.0, self.due - time.monotonic())

    def expired(self) -> ApiError:
        """What a request is told that is due."""
        self.admission.metrics.expired.inc()
        return deadline_passed()

    @contextmanager
    def stopping(self, stop: Stop) -> Iterator[None]:
        """Calls `stop` with the reason if the request is due, or the server ends, meanwhile."""
        left = self.seconds_left
        loop = asyncio.get_running_loop()
        alarm = None if left is None else loop.call_later(left, lambda: stop(self.expired()))
        self.stops.add(stop)
        try:
            yield
        finally:
            self.stops.discard(stop)
            if alarm is not None:
                alarm.cancel()


class Admission:
    """The queue of one app, and its keys' shares.

    A sequence waits from its request's arrival to the engine's first event of it. As many as the engine has
    places left are not counted as waiting.
    """

    def __init__(
        self,
        places: int,
        *,
        requests: int,
        tokens: int,
        body_bytes: int,
        limits: Limits,
        metrics: AdmissionMetrics,
        apart: bool = False,
    ) -> None:
        """`places`: sequences that the engine runs at once. `requests`, `tokens`: sequences, and tokens of
        their prompts, that may wait beside them. `body_bytes`: of all large bodies under way. `limits`: of
        each key. `apart`: keys share no cached prefixes."""
        self.metrics = metrics
        self.draining = False
        self.apart = apart
        self._places, self._most, self._most_tokens = places, requests, tokens
        self._limits = limits
        self._shares: dict[str | None, Share] = {}
        self._tickets: set[Ticket] = set()
        self._reserved = 0
        self._held, self._most_held = 0, body_bytes
        self._waiting: dict[str, int] = {}  # sequences without an event, and the tokens of their prompts
        self._tokens = 0  # of these, the sum
        self._running: set[str] = set()
        self._spenders: dict[str, Share] = {}  # whose tokens are counted
        self._begun: deque[float] = deque(maxlen=_REMEMBERED)
        metrics.watch(lambda: (self.queued, self._tokens), requests, tokens)

    @property
    def queued(self) -> int:
        """Sequences that wait though every place is taken."""
        return max(0, self._reserved + len(self._waiting) - self._free)

    @property
    def _free(self) -> int:
        return max(0, self._places - len(self._running))

    def open(self, key: str | None, *, generates: bool) -> Ticket:
        """A ticket for a request of this key, to be closed. Raises ApiError: 429; 503 if the server ends."""
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = Share(key, self._limits)
        if self.draining:
            raise self._counted(shutting_down())
        if generates:
            self._check_place(share)
        try:
            share.enter()
        except ApiError as error:
            raise self._counted(error) from None
        ticket = Ticket(self, share, generates)
        self._tickets.add(ticket)
        return ticket

    def hold(self, ticket: Ticket, size: int) -> None:
        """A body that is under way has so many bytes. Raises ApiError 429 if all together are too many."""
        if self._held + size - ticket.held > self._most_held:
            error = self._full("body_bytes", "too many large request bodies are under way")
            error.headers["Connection"] = "close"
            raise error
        self._held += size - ticket.held
        ticket.held = size

    def release_body(self, ticket: Ticket) -> None:
        self._held -= ticket.held
        ticket.held = 0

    def reserve(self, ticket: Ticket) -> None:
        """A place for one sequence of this request. Raises ApiError 429."""
        self._check_place(ticket.share)
        self._reserved += 1
        ticket.share.waiting += 1
        ticket.reserved = True

    def queue_up(self, ticket: Ticket, requests: Sequence[GenerateRequest]) -> None:
        """The sequences of a request join the queue in its ticket's place. Raises ApiError 429.

        One that could not even enter an empty queue is taken when nothing else waits.
        """
        self._give_back(ticket)
        tokens = sum(len(request.prompt_ids) for request in requests)
        if self._reserved + len(self._waiting) and not self._room(ticket.share, len(requests)):
            what = f"{len(requests)} sequences find no place: {self.queued} wait already"
            raise self._full("queue_requests", what)
        if self._waiting and not self._room_for_tokens(ticket.share, tokens):
            what = f"prompts of {tokens} tokens find no place: {self._tokens} tokens wait already"
            raise self._full("queue_tokens", what)
        for request in requests:
            ticket.ids.append(request.id)
            self._waiting[request.id] = len(request.prompt_ids)
            self._spenders[request.id] = ticket.share
        self._tokens += tokens
        ticket.share.waiting += len(requests)
        ticket.share.waiting_tokens += tokens
        ticket.share.spend(tokens)

    def on_step(self, _: StepStats, events: Sequence[TokenEvent]) -> None:
        """Takes one engine step in: who runs now, who has ended, whose tokens these are."""
        for event in events:
            if event.id in self._waiting:
                self._end_wait(event.id)
                self._running.add(event.id)
                self._begun.append(time.monotonic())
            if event.finish_reason is not None:
                self._running.discard(event.id)
            if (share := self._spenders.get(event.id)) is not None:
                share.spend(len(event.token_ids))

    def left(self, ident: str) -> None:
        """A sequence has ended, or is given up: it holds no place, whatever its request still does."""
        if ident in self._waiting:
            self._end_wait(ident)
        self._running.discard(ident)

    def close(self, ticket: Ticket) -> None:
        """The request has been answered, or its client has left."""
        self._tickets.discard(ticket)
        self._give_back(ticket)
        ticket.share.leave()
        for ident in ticket.ids:
            self.left(ident)
            self._spenders.pop(ident, None)

    def stop_all(self) -> None:
        """Ends all answers that are being generated, each with an error that says why."""
        for ticket in list(self._tickets):
            for stop in list(ticket.stops):
                stop(shutting_down("the answer did not end in time"))

    def _check_place(self, share: Share) -> None:
        if not self._room(share, 1):
            raise self._full("queue_requests", f"{self.queued} requests wait already")

    def _room(self, share: Share, sequences: int) -> bool:
        """Whether so many more of this key may wait: while the queue is not full, and beyond that where the
        key has less than an even part of it: no other keys, and no one large request, can keep it out."""
        over = self._reserved + len(self._waiting) + sequences - self._free - self._most
        return over <= 0 or share.waiting + sequences <= max(1, self._most // self._keys(share))

    def _room_for_tokens(self, share: Share, tokens: int) -> bool:
        over = self._tokens + tokens - self._most_tokens
        return over <= 0 or share.waiting_tokens + tokens <= self._most_tokens // self._keys(share)

    def _keys(self, share: Share) -> int:
        """Keys that wait, this one included."""
        return sum(each.waiting > 0 or each is share for each in self._shares.values())

    def _end_wait(self, ident: str) -> None:
        tokens, share = self._waiting.pop(ident), self._spenders[ident]
        self._tokens -= tokens
        share.waiting -= 1
        share.waiting_tokens -= tokens

    def _give_back(self, ticket: Ticket) -> None:
        if ticket.reserved:
            self._reserved -= 1
            ticket.share.waiting -= 1
        ticket.reserved = False

    def _full(self, reason: str, message: str) -> ApiError:
        return self._counted(too_many(f"the server is full: {message}", reason, "queue_full", self._wait()))

    def _counted(self, error: ApiError) -> ApiError:
        self.metrics.refused.labels(error.reason).inc()
        return error

    def _wait(self) -> float:
        """Seconds in which the queue should have moved on by one that comes now, by how it moved lately."""
        now = time.monotonic()
        lately = [at for at in self._begun if at > now - _LATELY]
        rate = len(lately) / max(now - lately[0], 0.1) if len(lately) > 1 else 0.0
        return self.queued / rate if rate else 1.0


_current: ContextVar[Ticket] = ContextVar("ticket")
enter, leave = _current.set, _current.reset


def current() -> Ticket:
    """The ticket of the request that is being answered here. Raises LookupError for one that has none."""
    return _current.get()
