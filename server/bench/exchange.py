"""One streamed request: what came back when, and of what kind its failure was. Knows no schedule."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from server.bench.told import BadFigure, count_of, speculation_of
from server.log_lines import one_line

_SHOWN = 500  # characters of an error that are kept
_LONGEST = 1 << 24  # bytes of a line
_LONGEST_ERROR = 1 << 16  # bytes of an error's answer
_MOST_IN_CHUNK = 10_000  # tokens
_LONGEST_RETRY = 1e6  # seconds
_STREAMS = ("text/event-stream", "text/plain", "")  # some do not name theirs


@dataclass
class Record:
    """One request. Times in seconds of one clock; `first` and `last` are those of chunks with output.

    `gaps` are the seconds between tokens if `by_token`, else between chunks. `tokens` is of usage, or
    of chunks where there was none (`counted`). `error` is the kind of failure, None for a good one.
    """

    number: int
    sent: float
    due: float | None = None  # when its schedule wanted it
    first: float | None = None
    last: float | None = None
    ended: float = 0.0
    chunks: int = 0
    tokens: int = 0
    prompt_tokens: int | None = None
    counted: str = "usage"
    gaps: list[float] = field(default_factory=list)
    by_token: bool = False
    finish_reason: str | None = None
    speculation: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    message: str = ""
    retry_after: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first output."""
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where one chunk or one token has no time between."""
        if self.first is None or self.last is None or min(self.tokens, self.chunks) < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


class Failure(Exception):
    """Why a request failed: a short `kind` that can be counted, and what was seen."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None

    def has_output(self) -> bool:
        """Chat opens with a bare role and ends with an empty delta; a completion's chunk has its token."""
        if self.delta is None:
            return True
        return any(value for name, value in self.delta.items() if name != "role")


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    speculation: Any = None  # ours
    timings: Any = None  # llama.cpp's
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


async def exchange(
    client: httpx.AsyncClient, make: Callable[[], httpx.Request], number: int, due: float | None = None
) -> Record:
    """Sends what `make` gives and reads its stream to the end. Failures are in the record, not raised."""
    reader = _Reader(Record(number, sent=time.monotonic(), due=due))
    try:
        request = make()
        reader.record.sent = time.monotonic()
        async with aclosing(await client.send(request, stream=True)) as response:
            await _expect_stream(response)
            async for data in _events(response):
                reader.read(data)
        reader.finish()
    except Failure as failure:
        reader.failed(failure.kind, str(failure), failure.retry_after)
    except httpx.TimeoutException as error:
        reader.failed("timeout", f"{type(error).__name__}: {error}")
    except httpx.ConnectError as error:
        reader.failed("connect", f"{type(error).__name__}: {error}")
    except httpx.HTTPError as error:
        reader.failed("broke off", f"{type(error).__name__}: {error}")
    except BadFigure as error:
        reader.failed("bad figure", str(error))
    except Exception as error:  # whatever it is, it is this request's alone
        reader.failed(type(error).__name__, f"{type(error).__name__}: {error}")
    reader.record.ended = time.monotonic()
    return reader.record


async def _expect_stream(response: httpx.Response) -> None:
    """Raises Failure unless events follow."""
    kind = response.headers.get("content-type", "")
    if response.status_code == 200 and kind.partition(";")[0] in _STREAMS:
        return
    body = b""
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > _LONGEST_ERROR:
            break
    text = _shown(body)
    if response.status_code == 200:
        raise Failure("not a stream", f"content-type {kind!r}: {text}")
    retry = _seconds(response.headers.get("retry-after"))
    raise Failure(f"HTTP {response.status_code}", f"HTTP {response.status_code}: {text}", retry)


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After; its other form, a date, is not waited for."""
    return min(float(text), _LONGEST_RETRY) if text is not None and text.strip().isdecimal() else None


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of every event but [DONE]. Raises Failure for a stream without it."""
    rest, done = b"", False
    async for piece in response.aiter_raw():  # to its end, or the connection could not be used again
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _LONGEST:
            raise Failure("not a chunk", f"a line of over {_LONGEST} bytes: {_shown(rest)}")
        for line in lines:
            name, _, data = line.partition(b":")
            data = data.strip()
            if name == b"error":  # llama.cpp's way
                raise Failure("error in stream", f"an error in the stream: {_shown(data)}")
            if name != b"data":
                continue
            done = done or data == b"[DONE]"
            if not done:
                yield data
    if not done:
        raise Failure("broke off", "the stream broke off before [DONE]")


class _Reader:
    """Fills a record from the chunks of its stream."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._usage: Mapping[str, Any] | None = None
        self._told = 0  # tokens, by the usage of the last chunk that had one
        self._finished: float | None = None  # when a chunk without output said that it ends

    def read(self, data: bytes) -> None:
        """One chunk that comes now. Raises Failure for one that is none, or reports an error."""
        now = time.monotonic()
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise Failure("not a chunk", f"not a chunk ({error}): {_shown(data)}") from error
        if chunk.error is not None or (chunk.choices is None and chunk.usage is None):
            raise Failure("error in stream", f"an error in the stream: {_shown(data)}")
        try:
            self._take(chunk, now)
        except BadFigure as error:
            raise Failure("bad figure", f"{error}: {_shown(data)}") from error

    def _take(self, chunk: _Chunk, now: float) -> None:
        record = self.record
        self._usage = chunk.usage or self._usage
        if isinstance(chunk.speculation, dict):
            record.speculation.append(speculation_of(chunk.speculation))
        elif isinstance(chunk.timings, dict) and (drafted := count_of(chunk.timings, "draft_n")) is not None:
            accepted = count_of(chunk.timings, "draft_n_accepted") or 0
            record.speculation.append({"drafted": drafted, "accepted": accepted})
        choices = chunk.choices or []
        for choice in choices:
            record.finish_reason = choice.finish_reason or record.finish_reason
        if any(choice.has_output() for choice in choices):
            self._output(now, count_of(chunk.usage, "completion_tokens"))
        elif choices and record.finish_reason is not None:
            self._finished = now

    def _output(self, now: float, told: int | None) -> None:
        record = self.record
        record.chunks += 1
        if record.last is None:
            record.first = record.last = now
            self._told = told or 0
            record.by_token = told is not None
            return
        gap, record.last = now - record.last, now
        if told is None:
            record.gaps.append(gap)
        elif (new := told - self._told) > _MOST_IN_CHUNK:
            raise BadFigure(f"completion_tokens grew by over {_MOST_IN_CHUNK} in one chunk")
        elif new > 0:  # a gap of N tokens is N gaps of gap/N
            record.gaps += [gap / new] * new
            self._told = told
        elif record.gaps:  # text that was held back: its token was counted before
            record.gaps[-1] += gap

    def finish(self) -> None:
        """Counts the tokens of a stream that came to its end. Raises Failure if there was no output."""
        record = self.record
        if record.first is None:
            if self._finished is None:
                raise Failure("no output", "no chunk with a choice")
            record.first = record.last = self._finished  # the answer is empty: its end was all there was
        tokens = count_of(self._usage, "completion_tokens")
        record.prompt_tokens = count_of(self._usage, "prompt_tokens")
        record.tokens = record.chunks if tokens is None else tokens
        record.counted = "chunks" if tokens is None else "usage"
        if not record.speculation and self._usage is not None:
            record.speculation = _predictions(self._usage)

    def failed(self, kind: str, message: str, retry_after: float | None = None) -> None:
        """Marks the record; what came until then stays in it."""
        record = self.record
        record.error, record.message, record.retry_after = kind, one_line(message[:_SHOWN]), retry_after


def _predictions(usage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Drafted and accepted tokens of usage, where a server tells them there."""
    details = usage.get("completion_tokens_details")
    accepted, rejected = (
        count_of(details if isinstance(details, dict) else None, f"{name}_prediction_tokens")
        for name in ("accepted", "rejected")
    )
    if not accepted and not rejected:
        return []
    return [{"drafted": (accepted or 0) + (rejected or 0), "accepted": accepted or 0}]


def _shown(data: bytes) -> str:
    return data[:_SHOWN].decode(errors="replace")
