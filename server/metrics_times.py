"""How long sequences waited, prefilled and decoded."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Histogram

from engine.types import TokenEvent

FINE = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
        0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)  # fmt: skip
_LONG = (*FINE, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)


class Times:
    """The histograms. Tokens count when they reach the server, phases as the engine saw them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...] = _LONG) -> Histogram:
            return Histogram(f"disco_{name}", text, registry=registry, buckets=buckets)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token"
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "A gap of N tokens is N observations of gap/N", FINE
        )
        self.queue = histogram("request_queue_seconds", "From arrival to the sequence's first step")
        self.prefill = histogram("request_prefill_seconds", "From there to the first token")
        self.decode = histogram("request_decode_seconds", "From the first token to the last one")
        self.end_to_end = histogram("request_seconds", "From arrival to the last token")

    def of(self, arrival: float) -> SequenceTimes:
        """The stopwatch of a sequence whose request arrived then, by `time.monotonic`."""
        return SequenceTimes(self, arrival)


class SequenceTimes:
    """One sequence's times; told as its events come."""

    def __init__(self, told: Times, arrival: float) -> None:
        self._told, self._arrival = told, arrival
        self._seen: float | None = None  # when the last tokens came
        self._first: float | None = None  # when the engine had the first one
        self._last: float | None = None

    def take(self, event: TokenEvent) -> None:
        """An event has reached the server."""
        self._last = event.at
        if event.scheduled is not None and event.at is not None:
            self._first = event.at
            self._told.queue.observe(max(event.scheduled - self._arrival, 0.0))
            self._told.prefill.observe(event.at - event.scheduled)
        if event.token_ids:
            self._tokens(len(event.token_ids))

    def _tokens(self, count: int) -> None:
        now = time.monotonic()
        gap = now - (self._arrival if self._seen is None else self._seen)
        if self._seen is None:
            self._told.first_token.observe(gap)
            count, gap = count - 1, 0.0  # the rest of a first block came with it
        for _ in range(count):
            self._told.inter_token.observe(gap / count)
        self._seen = now

    def end(self) -> None:
        """The sequence is whole."""
        self._told.end_to_end.observe(time.monotonic() - self._arrival)
        decoded = self._seen is not None  # nothing is with `max_tokens: 0`
        if decoded and self._first is not None and self._last is not None:
            self._told.decode.observe(self._last - self._first)
