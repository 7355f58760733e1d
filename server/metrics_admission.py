"""Who was not let in and why, and what waits. No label tells a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

REASONS = (
    "queue_requests", "queue_tokens", "body_bytes",
    "key_concurrency", "key_requests", "key_tokens", "draining",
)  # fmt: skip


class AdmissionMetrics(Collector):
    """Of one app's admission, which is watched once it is there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.refused = Counter(
            "disco_refused_requests_total", "Requests that were not let in", ("reason",), registry=registry
        )
        for reason in REASONS:
            self.refused.labels(reason)  # told as 0
        self.expired = Counter(
            "disco_expired_requests_total", "Requests whose time was over before their end", registry=registry
        )
        self._queue: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._most = (0, 0)
        registry.register(self)

    def watch(self, queue: Callable[[], tuple[int, int]], requests: int, tokens: int) -> None:
        """`queue()`: sequences and tokens of prompts that wait; the others are their bounds."""
        self._queue, self._most = queue, (requests, tokens)

    def collect(self) -> Iterator[Metric]:
        """The queue, as it is now."""
        requests, tokens = self._queue()
        for name, text, value in (
            ("queued_requests", "Sequences that wait for a place", requests),
            ("queued_requests_limit", "Sequences that may wait", self._most[0]),
            ("queued_tokens", "Tokens of the prompts that wait", tokens),
            ("queued_tokens_limit", "Tokens of prompts that may wait", self._most[1]),
        ):
            yield GaugeMetricFamily(f"disco_{name}", text, value=value)
