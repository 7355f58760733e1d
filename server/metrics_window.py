"""Ratios of the last minute, computed when they are asked for."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS = 60
By = tuple[str, str]
"""Policy and drafter."""

_DRAFTED, _ACCEPTED, _LOOKAHEADS, _ITERATIONS, _BASELINE, _SPENT = range(6)
_RATIOS = (
    ("disco_acceptance_rate", "Accepted of the tokens drafted, over the last 60 s", _ACCEPTED, _DRAFTED),
    ("disco_average_lookahead", "Longest way of a draft, over the last 60 s", _LOOKAHEADS, _ITERATIONS),
    (
        "disco_speedup_ratio",
        "Time that the tokens of the last 60 s would have taken without a draft, of the time they took",
        _BASELINE,
        _SPENT,
    ),
)


class Window(Collector):
    """Sums of each second, kept for a minute. A ratio with nothing to divide by is not told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[tuple[int, dict[By, list[float]]]] = deque()

    def add(
        self,
        by: By,
        drafted: int,
        accepted: int,
        lookaheads: int,
        iterations: int,
        baseline: float,
        spent: float,
    ) -> None:
        """Counts what a step gave rows of this policy and drafter: tokens, and times in seconds."""
        now = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != now:
            self._forget(now)
            self._seconds.append((now, defaultdict(lambda: [0.0] * 6)))
        sums = self._seconds[-1][1][by]
        for place, value in enumerate((drafted, accepted, lookaheads, iterations, baseline, spent)):
            sums[place] += value

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The three gauges."""
        self._forget(int(self._clock()))
        sums: dict[By, list[float]] = {}
        for _, second in self._seconds:
            for by, values in second.items():
                sums[by] = [a + b for a, b in zip(sums.get(by, [0.0] * 6), values, strict=True)]
        for name, text, above, below in _RATIOS:
            family = GaugeMetricFamily(name, text, labels=("policy", "drafter"))
            for by, values in sorted(sums.items()):
                # without a baseline nothing is known of the costs yet
                if values[below] and (values[above] or above != _BASELINE):
                    family.add_metric(by, values[above] / values[below])
            yield family

    def _forget(self, now: int) -> None:
        while self._seconds and self._seconds[0][0] <= now - SECONDS:
            self._seconds.popleft()
