"""A load: which requests are sent when, by one process or by one of several."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, count, islice, takewhile
from typing import Any

import httpx
import msgspec

from server.bench.exchange import Record, exchange
from server.bench.told import check_sending, without_key, without_userinfo

_TICK = 0.02  # seconds between two looks at the loop's lag
_LONGEST_PAUSE = 10.0  # seconds of a Retry-After that are waited for
_NOT_THERE = 0.1  # seconds until a stream asks a server again that refused the connection
_WARMING = 4  # requests at once that warm up for an open loop


@dataclass(frozen=True)
class Load:
    """What is asked, and how often. Exactly one of `streams` (closed loop: each sends its next request
    when its last has ended) and `rate` (open loop: requests a second, a Poisson process by `seed`); one of
    `requests` and `seconds` at least. `prompts` take turns from number `first`, warm-up included.

    `path` is "completions" or "chat/completions", `fields` the rest of the body, `timeout` in seconds
    without any byte. `demand` says what a request lacks that came to its end, or None. `stop_at_error`: the
    first failure ends all by LoadStopped.
    """

    url: str
    path: str
    prompts: tuple[Any, ...]
    fields: Mapping[str, Any]
    streams: int | None = None
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 0
    first: int = 0
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    demand: Callable[[Record], str | None] | None = None
    stop_at_error: bool = False

    def check(self) -> None:
        """Raises ValueError, naming what cannot work."""
        if (self.streams is None) == (self.rate is None):
            raise ValueError("one of streams and rate is wanted")
        if self.streams is not None and self.streams < 1:
            raise ValueError(f"streams must be at least 1, not {self.streams}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"rate must be over 0 requests a second, not {self.rate}")
        if self.requests is None and self.seconds is None:
            raise ValueError("requests or seconds must say when the load ends")
        if self.requests is not None and self.requests < (self.streams or 1):
            raise ValueError(f"{self.requests} requests leave some of {self.streams or 1} streams idle")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be over 0, not {self.seconds}")
        if not self.prompts:
            raise ValueError("no prompts")
        check_sending(self.timeout, self.api_key)
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL:
            raise ValueError(f"url {without_userinfo(self.url)!r} is not one") from None

    def body(self, number: int) -> bytes:
        """Request `number`, as JSON."""
        key = "messages" if self.path.startswith("chat") else "prompt"
        return msgspec.json.encode({key: self.prompts[number % len(self.prompts)], **self.fields})

    def arrivals(self) -> Iterator[float]:
        """When requests of an open loop are due, in seconds from its begin."""
        assert self.rate is not None
        draw, rate = random.Random(self.seed).expovariate, self.rate
        times: Iterator[float] = accumulate(draw(rate) for _ in count())
        if self.seconds is not None:
            times = takewhile(lambda at: at < (self.seconds or 0), times)
        return islice(times, self.requests)


@dataclass(frozen=True)
class Share:
    """The part of a load that is one process's: every `of`-th request, from `index`."""

    index: int = 0
    of: int = 1

    def pick(self, items: Iterable[Any]) -> Iterator[Any]:
        return islice(items, self.index, None, self.of)

    def size(self, total: int) -> int:
        return len(range(self.index, total, self.of))


ALL = Share()


@dataclass
class Outcome:
    """What a load gave. `cpu` is the busiest process's share of a core; `lags` are how late the loops woke
    up, in seconds; `cut` requests were under way when it was `interrupted`."""

    records: list[Record] = field(default_factory=list)
    warmup: list[Record] = field(default_factory=list)
    cut: int = 0
    interrupted: bool = False
    cpu: float = 0.0
    lags: list[float] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Takes in what another process gave."""
        self.records += other.records
        self.warmup += other.warmup
        self.cut += other.cut
        self.interrupted |= other.interrupted
        self.cpu = max(self.cpu, other.cpu)
        self.lags += other.lags


class LoadStopped(Exception):
    """A request failed under `stop_at_error`; `record` is its, `good` ones had ended before."""

    def __init__(self, record: Record, good: int) -> None:
        super().__init__(record, good)  # so that it can be sent between processes
        self.record, self.good = record, good


async def _go_on() -> None:
    pass


async def drive(load: Load, share: Share = ALL, warm: Callable[[], Awaitable[None]] = _go_on) -> Outcome:
    """Warms up, awaits `warm()`, then sends this process's share. Cancelled, it gives what it has so far.

    Raises LoadStopped.
    """
    outcome = Outcome()
    sender = _Sender(load)
    try:
        warmup = list(share.pick(range(load.first, load.first + load.warmup)))
        at_once = max(1, share.size(load.streams or _WARMING))
        await sender.closed_loop(warmup, at_once, outcome.warmup)
        await warm()
        await _measured(sender, load, share, outcome)
    except asyncio.CancelledError:
        outcome.interrupted = True
    finally:
        outcome.cut = sender.open
        with suppress(asyncio.CancelledError):
            await sender.close()
    return outcome


async def _measured(sender: _Sender, load: Load, share: Share, outcome: Outcome) -> None:
    watch = asyncio.create_task(_watch(outcome.lags))
    begin, used = time.monotonic(), time.process_time()
    numbers = share.pick(count(load.first + load.warmup))
    try:
        if load.rate is not None:
            due = ((begin + at, next(numbers)) for at in share.pick(load.arrivals()))
            await sender.open_loop(due, outcome.records)
        else:
            requests = None if load.requests is None else share.size(load.requests)
            end = None if load.seconds is None else begin + load.seconds
            streams = share.size(load.streams or 0)
            await sender.closed_loop(islice(numbers, requests), streams, outcome.records, end)
    finally:
        outcome.cpu = (time.process_time() - used) / (time.monotonic() - begin)
        watch.cancel()


async def _watch(lags: list[float]) -> None:
    """Notes how late this loop comes back to what waits for it."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(_TICK)
        lags.append(max(0.0, time.monotonic() - before - _TICK))


class _Sender:
    """Clients with one connection each: what a shared pool does for a request grows with its connections."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._context = httpx.create_ssl_context()  # takes longer to make than all the rest
        self._free: list[httpx.AsyncClient] = []
        self._clients: list[httpx.AsyncClient] = []
        self.open = 0

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        if self._free:
            return self._free.pop()
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._load.api_key is not None:
            headers["authorization"] = f"Bearer {self._load.api_key}"
        client = httpx.AsyncClient(
            base_url=self._load.url, headers=headers, timeout=self._load.timeout,
            verify=self._context, trust_env=False,
        )  # fmt: skip
        self._clients.append(client)
        return client

    async def _one(self, number: int, records: list[Record], due: float | None = None) -> Record:
        client = self._client()

        def make() -> httpx.Request:
            return client.build_request("POST", self._load.path, content=self._load.body(number))

        self.open += 1
        record = await exchange(client, make, number, due)
        record.message = without_key(record.message, self._load.api_key)
        self.open -= 1  # one that is cancelled stays open: it was cut
        self._free.append(client)
        demand = self._load.demand
        if record.error is None and demand is not None and (lack := demand(record)) is not None:
            record.error, record.message = "lacking", lack
        if record.error is not None and self._load.stop_at_error:
            raise LoadStopped(record, len(records))
        records.append(record)
        return record

    async def closed_loop(
        self, numbers: Iterable[int], streams: int, records: list[Record], end: float | None = None
    ) -> None:
        """All of `numbers`, or as many as begin before `end`, in `streams` at once."""
        waiting = iter(numbers)

        async def stream() -> None:
            for number in waiting:
                record = await self._one(number, records)
                await asyncio.sleep(_pause(record, end))
                if end is not None and time.monotonic() >= end:
                    return

        await _all_of([stream() for _ in range(streams)])

    async def open_loop(self, due: Iterator[tuple[float, int]], records: list[Record]) -> None:
        """Each request at its time, however many are open."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for at, number in due:
                    await asyncio.sleep(max(0.0, at - time.monotonic()))
                    tasks.create_task(self._one(number, records, at))
        except* LoadStopped as group:
            raise _first(group) from None


async def _all_of(streams: Sequence[Any]) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(stream)
    except* LoadStopped as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[LoadStopped]) -> LoadStopped:
    found = group.exceptions[0]
    assert isinstance(found, LoadStopped)
    return found


def _pause(record: Record, end: float | None) -> float:
    """Seconds that a stream waits after a request: a server that is full or away is not asked in a frenzy."""
    if record.error is None:
        return 0.0
    wanted = record.retry_after or (_NOT_THERE if record.error == "connect" else 0.0)
    left = _LONGEST_PAUSE if end is None else max(0.0, end - time.monotonic())
    return min(wanted, _LONGEST_PAUSE, left)
