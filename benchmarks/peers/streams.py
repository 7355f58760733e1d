"""Streams of requests to a server with OpenAI's API, and what came back when. One process or several."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import httpx
import msgspec


class LoadError(Exception):
    """A request failed, so there is nothing to measure; the message says which way."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server. `tokens` a request, `timeout` in seconds without any byte."""

    url: str
    model: str
    streams: int
    tokens: int
    requests: int
    prompts: tuple[str | tuple[int, ...], ...]
    speculation: dict[str, Any] | None = None
    ignore_eos: bool = True
    api_key: str | None = None
    timeout: float = 300.0

    def check(self) -> None:
        """Raises ValueError, naming what cannot work."""
        if min(self.streams, self.tokens) < 1:
            raise ValueError(f"streams ({self.streams}) and tokens ({self.tokens}) must be at least 1")
        if self.requests < self.streams:
            raise ValueError(f"{self.requests} requests leave some of {self.streams} streams idle")
        if not self.prompts:
            raise ValueError("no prompts")
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"url {self.url!r}: {error}") from error

    def body(self, number: int) -> bytes:
        """Request `number`, as JSON."""
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompts[number % len(self.prompts)],
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.speculation is not None:
            fields["speculation"] = self.speculation
        return msgspec.json.encode(fields)


@dataclass(frozen=True)
class Answer:
    """One request: when it was sent, gave its first and last chunk with a choice, and ended (seconds
    of one clock), with how many such chunks and tokens."""

    sent: float
    first: float
    last: float
    ended: float
    chunks: int
    tokens: int

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """None where one chunk or one token has no time between."""
        return (self.last - self.first) / (self.tokens - 1) if min(self.tokens, self.chunks) > 1 else None


def send(load: Load, processes: int = 1) -> tuple[list[Answer], float]:
    """A warm-up round of one request a stream, then the load, over `processes` processes that begin
    together: the load's answers, and the share of a core that the busiest process took.

    Processes are spawned: a script that asks for more than one needs its `__main__` guard. Raises
    LoadError as soon as any request fails, ValueError for numbers that cannot work.
    """
    load.check()
    if not 1 <= processes <= load.streams:
        raise ValueError(f"{processes} load processes for {load.streams} streams")
    return _spread(load, processes) if processes > 1 else asyncio.run(_load(load, 0, lambda: None))


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    error: Any = None


_chunks = msgspec.json.Decoder(_Chunk)


async def _answer(client: httpx.AsyncClient, load: Load, request: httpx.Request) -> Answer:
    """Sends a request and reads its stream. Raises LoadError unless it is all there."""
    sent = time.monotonic()
    times: list[float] = []
    usage = None
    async with aclosing(await client.send(request, stream=True)) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise LoadError(f"HTTP {response.status_code}: {text[:500]}")
        async for data in _events(response):
            try:
                chunk = _chunks.decode(data)
            except msgspec.DecodeError as error:
                raise LoadError(f"not a chunk ({error}): {data[:200]!r}") from error
            if chunk.choices is None or chunk.error is not None:
                raise LoadError(f"an error in the stream: {data[:500].decode(errors='replace')}")
            if chunk.choices:
                times.append(time.monotonic())
            usage = chunk.usage or usage
    if usage is None:
        raise LoadError("no chunk with usage: the server must take stream_options.include_usage")
    if not times:
        raise LoadError("no chunk with a choice")
    if load.ignore_eos and usage.completion_tokens != load.tokens:
        raise LoadError(
            f"{usage.completion_tokens} of {load.tokens} tokens: does the server take ignore_eos?"
        )
    return Answer(sent, times[0], times[-1], time.monotonic(), len(times), usage.completion_tokens)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of every server-sent event but [DONE]. Raises LoadError for a stream without it."""
    rest, done = b"", False
    async for piece in response.aiter_raw():  # to its end, or the connection could not be used again
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                done = done or data == b"[DONE]"
                if not done:
                    yield data
    if not done:
        raise LoadError("the stream broke off before [DONE]")


async def _load(load: Load, first: int, warm: Callable[[], None]) -> tuple[list[Answer], float]:
    """A round of one request a stream, `warm()`, then all requests; the answers, and the share of a
    core that these took. Requests are numbered from `first`. The first failure ends them all."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client) for client in _clients(load)]
        # built here, so that building takes no time from streams that run
        numbers = range(first, first + load.streams + load.requests)
        built = [clients[0].build_request("POST", "completions", content=load.body(i)) for i in numbers]
        await _closed_loop(clients, load, built[: load.streams])
        warm()
        begin, used = time.monotonic(), time.process_time()
        answers = await _closed_loop(clients, load, built[load.streams :])
        return answers, (time.process_time() - used) / (time.monotonic() - begin)


def _clients(load: Load) -> list[httpx.AsyncClient]:
    """One a stream, with one connection: what a shared pool does for a request grows with its connections."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if load.api_key is not None:
        headers["authorization"] = f"Bearer {load.api_key}"
    context = httpx.create_ssl_context()  # takes longer to make than all the rest
    return [
        httpx.AsyncClient(
            base_url=load.url, headers=headers, timeout=load.timeout, verify=context, trust_env=False
        )
        for _ in range(load.streams)
    ]


async def _closed_loop(
    clients: Sequence[httpx.AsyncClient], load: Load, requests: Sequence[httpx.Request]
) -> list[Answer]:
    """All requests, each client sending its next one as soon as its last has ended."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def stream(client: httpx.AsyncClient) -> None:
        for request in waiting:
            try:
                answers.append(await _answer(client, load, request))
            except (LoadError, httpx.HTTPError) as error:
                what = str(error) if isinstance(error, LoadError) else f"{type(error).__name__}: {error}"
                raise LoadError(f"a request failed, after {len(answers)} good ones: {what}") from error

    try:
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(stream(client))
    except* LoadError as group:
        raise group.exceptions[0] from None
    return answers


def _spread(load: Load, processes: int) -> tuple[list[Answer], float]:
    """The load over several processes, which start together: all answers, the busiest one's share."""
    spawn = multiprocessing.get_context("spawn")  # forking a process with CUDA in it breaks CUDA
    pipes, children, first = [], [], 0
    try:
        for i in range(processes):
            streams, requests = (_share(n, i, processes) for n in (load.streams, load.requests))
            ours, theirs = spawn.Pipe()
            part = replace(load, streams=streams, requests=requests)
            children.append(spawn.Process(target=_child, args=(theirs, part, first), daemon=True))
            children[-1].start()
            theirs.close()  # so that a child that dies is noticed at our end
            pipes.append(ours)
            first += streams + requests
        _results(pipes)
        for pipe in pipes:
            pipe.send("go")
        results = _results(pipes)
    finally:
        for child in children:
            child.terminate()
            child.join()
    return [answer for answers, _ in results for answer in answers], max(cpu for _, cpu in results)


def _child(pipe: Connection, load: Load, first: int) -> None:
    """A load process: says "warm", waits for the word, then gives its result, or its LoadError."""

    def warm() -> None:
        pipe.send("warm")
        pipe.recv()

    try:
        pipe.send(asyncio.run(_load(load, first, warm)))
    except LoadError as error:
        pipe.send(error)


def _results(pipes: Sequence[Connection]) -> list[Any]:
    """What every process sends next. Raises the LoadError of the first that fails."""
    missing, results = list(pipes), []
    while missing:
        for pipe in wait(missing):
            assert isinstance(pipe, Connection)
            results.append(_result(pipe))
            missing.remove(pipe)
    return results


def _result(pipe: Connection) -> Any:
    try:
        result = pipe.recv()
    except EOFError as error:
        raise LoadError("a load process died") from error
    if isinstance(result, LoadError):
        raise result
    return result


def _share(total: int, i: int, parts: int) -> int:
    """How many of `total` part `i` takes, so that all parts differ by one at most."""
    return total // parts + (i < total % parts)
