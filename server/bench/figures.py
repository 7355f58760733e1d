"""What a level's requests amount to. Latencies in milliseconds, of good requests only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.bench.exchange import Record
from server.bench.load import Load, Outcome

PERCENTILES = (50, 90, 99)
BUSY = 0.8
"""Share of a core above which a load process may have held up its requests."""
LATE = 10.0
"""Milliseconds that a load process may be late at p99 before latencies are not the server's alone."""


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles (linear between ranks, as numpy's) of one kind of latency."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speculation:
    """Sums over the answers that tell of drafts. What a server does not tell is None."""

    policies: list[str]
    drafters: list[str]
    answers: int
    drafted: int
    accepted: int
    iterations: int | None
    acceptance_rate: float | None
    mean_sl: float | None
    mean_emitted: float | None


@dataclass(frozen=True)
class Level:
    """One concurrency, or one rate of requests a second. `seconds` from the first request sent to the last
    one ended; tokens a second are those of good requests over it. `late_p99_ms`: how much later than its
    schedule an open loop sent."""

    concurrency: int | None
    rate: float | None
    requests: int
    good: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    warmup_errors: dict[str, int]
    cut: int
    interrupted: bool
    seconds: float
    input_tokens: int | None
    output_tokens: int
    counted_by: str
    chunks: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    itl_of: str
    tpot_ms: Spread | None
    e2e_ms: Spread | None
    finish_reasons: dict[str, int]
    speculation: Speculation | None
    processes: int
    generator_cpu: float
    loop_lag_p99_ms: float | None
    late_p99_ms: float | None

    @property
    def failed(self) -> int:
        """Requests that failed, those of the warm-up included."""
        return sum(self.errors.values()) + sum(self.warmup_errors.values())

    @property
    def lag_bound_ms(self) -> float:
        """How late the load generator may be: LATE milliseconds, or a tenth of a slow server's token."""
        return max(LATE, 0.1 * (0.0 if self.tpot_ms is None else self.tpot_ms.p50))

    @property
    def held_up(self) -> bool:
        """Whether the load generator itself may have been measured."""
        late = max(self.loop_lag_p99_ms or 0.0, self.late_p99_ms or 0.0)
        return self.generator_cpu > BUSY or late > self.lag_bound_ms


def level_of(load: Load, outcome: Outcome, processes: int) -> Level:
    """The figures of a load; `processes` is how many sent it."""
    records = outcome.records
    good = [each for each in records if each.error is None]
    begin = min((each.sent for each in records), default=0.0)
    seconds = max((each.ended for each in records), default=begin) - begin
    tokens = sum(each.tokens for each in good)
    read = [each.prompt_tokens for each in good]
    late = [each.sent - each.due for each in records if each.due is not None]
    return Level(
        concurrency=load.streams,
        rate=load.rate,
        requests=len(records),
        good=len(good),
        errors=_kinds(records),
        error_examples={each.error: each.message for each in records + outcome.warmup if each.error},
        warmup_errors=_kinds(outcome.warmup),
        cut=outcome.cut,
        interrupted=outcome.interrupted,
        seconds=seconds,
        input_tokens=sum(each or 0 for each in read) if read and None not in read else None,
        output_tokens=tokens,
        counted_by=" and ".join(sorted({each.counted for each in good}, reverse=True)) or "usage",
        chunks=sum(each.chunks for each in good),
        output_tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        ttft_ms=spread(each.ttft for each in good),
        itl_ms=spread(gap for each in good for gap in each.gaps),
        itl_of="tokens" if good and all(each.by_token for each in good) else "chunks",
        tpot_ms=spread(each.tpot for each in good),
        e2e_ms=spread(each.ended - each.sent for each in good),
        finish_reasons=dict(Counter(str(each.finish_reason) for each in good)),
        speculation=_speculation(good),
        processes=processes,
        generator_cpu=outcome.cpu,
        loop_lag_p99_ms=_percentile(outcome.lags, 99),
        late_p99_ms=_percentile(late, 99),
    )


def spread(seconds: Iterable[float | None]) -> Spread | None:
    """In milliseconds; None of nothing."""
    known = [each for each in seconds if each is not None]
    if not known:
        return None
    return Spread(
        float(np.mean(known)) * 1e3, *(float(each) * 1e3 for each in np.percentile(known, PERCENTILES))
    )


def _percentile(seconds: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(seconds, percent)) * 1e3 if seconds else None


def _kinds(records: Iterable[Record]) -> dict[str, int]:
    return dict(Counter(each.error for each in records if each.error is not None).most_common())


def _speculation(records: Sequence[Record]) -> Speculation | None:
    told = [record.speculation for record in records if record.speculation]
    if not told:
        return None
    parts = [part for parts in told for part in parts]
    drafted, accepted = _sum(parts, "drafted"), _sum(parts, "accepted")
    counted = all("iterations" in part for part in parts)
    iterations = _sum(parts, "iterations") if counted else None
    return Speculation(
        policies=sorted({str(part["policy"]) for part in parts if "policy" in part}),
        drafters=sorted({str(part["drafter"]) for part in parts if "drafter" in part}),
        answers=len(told),
        drafted=drafted,
        accepted=accepted,
        iterations=iterations,
        acceptance_rate=accepted / drafted if drafted else None,
        mean_sl=_mean(parts, "mean_sl", drafted) if iterations else None,
        mean_emitted=_mean(parts, "mean_emitted", 0) if iterations else None,
    )


def _mean(parts: Sequence[Mapping[str, Any]], name: str, total: int) -> float:
    """Over the iterations of all parts: of what each tells, or of a total where none tells it."""
    iterations = _sum(parts, "iterations")
    if not any(name in part for part in parts):
        return total / iterations
    return float(sum(part.get(name, 0.0) * part["iterations"] for part in parts)) / iterations


def _sum(parts: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(int(part.get(name, 0)) for part in parts)
