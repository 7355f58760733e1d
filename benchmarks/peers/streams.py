"""Streams of requests to a server with OpenAI's API, every one of which must succeed.

Sent and read by the load generator of `disco-serve bench`; this is the strict form of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from server.bench import load as bench
from server.bench.exchange import Record
from server.bench.processes import ProcessDied
from server.bench.processes import send as send_all


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

    def closed_loop(self) -> bench.Load:
        """The same for the load generator. Raises ValueError, naming what cannot work."""
        if min(self.streams, self.tokens) < 1:
            raise ValueError(f"streams ({self.streams}) and tokens ({self.tokens}) must be at least 1")
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.speculation is not None:
            fields["speculation"] = self.speculation
        found = bench.Load(
            self.url, "completions", self.prompts, fields, streams=self.streams, requests=self.requests,
            warmup=self.streams, api_key=self.api_key, timeout=self.timeout, stop_at_error=True,
            demand=partial(_lacks, self.tokens if self.ignore_eos else None),
        )  # fmt: skip
        found.check()
        return found


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
    try:
        outcome = send_all(load.closed_loop(), processes)
    except bench.LoadStopped as stopped:
        what = f"a request failed, after {stopped.good} good ones: {stopped.record.message}"
        raise LoadError(what) from stopped
    except ProcessDied as error:
        raise LoadError(str(error)) from error
    if outcome.interrupted:
        raise KeyboardInterrupt
    return [_answer(record) for record in outcome.records], outcome.cpu


def _lacks(tokens: int | None, record: Record) -> str | None:
    """What a request that came to its end must have besides."""
    if record.counted != "usage":
        return "no chunk with usage: the server must take stream_options.include_usage"
    if tokens is not None and record.tokens != tokens:
        return f"{record.tokens} of {tokens} tokens: does the server take ignore_eos?"
    return None


def _answer(record: Record) -> Answer:
    assert record.first is not None and record.last is not None  # it came to its end
    return Answer(record.sent, record.first, record.last, record.ended, record.chunks, record.tokens)
