"""Prometheus metrics of one app: docs/operations.md describes each. Base units; labels are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.types import StepStats, TokenEvent
from server.metrics_admission import AdmissionMetrics
from server.metrics_engine import EngineMetrics
from server.metrics_ledger import Ledger
from server.metrics_speculation import Speculation
from server.metrics_times import Times
from server.metrics_vllm import VllmNames


class Metrics(Collector):
    """The metrics of one app in a registry of their own, so that two apps in one process do not share them.

    What is told by `collect` has the constant `labels` on every sample, and is told under vLLM's names, too,
    if `vllm_model` says what they call the model.
    """

    def __init__(self, labels: Mapping[str, str] | None = None, vllm_model: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._labels = dict(labels or {})
        self.plain_names = vllm_model is None  # OpenMetrics writes no colons
        self._views: list[Collector] = [self.registry]
        if vllm_model is not None:
            self._views.append(VllmNames(self.registry, vllm_model))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"disco_{name}", text, labels, registry=self.registry)

        self.http_requests = counter("http_requests_total", "HTTP answers", "route", "status")
        self.requests = counter("requests_total", "Sequences ended, by outcome", "outcome")
        for outcome in ("stop", "length", "abort", "error"):
            self.requests.labels(outcome)  # told as 0
        self.limit = Gauge("disco_requests_limit", "Sequences that may run at once", registry=self.registry)
        self.in_flight = Gauge(
            "disco_requests_in_flight", "Sequences that the server waits for", registry=self.registry
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of started sequences")
        self.admission = AdmissionMetrics(self.registry)
        self.ledger = Ledger(self.registry)
        self.times = Times(self.registry)
        self.speculation = Speculation(self.registry)

    def expect(self, routes: Iterable[str]) -> None:
        """Tells failures of these routes' templates as 0, so that a rate sees the first ones too."""
        for route in (*routes, "unmatched"):
            for status in ("500", "503"):
                self.http_requests.labels(route, status)

    def watch(self, engine: EngineClient, version: str) -> None:
        """Follows this engine's steps and state; `version` is the server's."""
        own = EngineMetrics(self.registry, engine, version)

        def on_step(stats: StepStats, events: list[TokenEvent]) -> None:
            own.on_step(stats)
            self.ledger.on_step(stats, events, engine.restarts)
            self.speculation.on_step(stats, events)

        engine.on_step(on_step)

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        for view in self._views:
            for family in view.collect():
                # the times of creation would double the series, and tell what a restart of the server tells
                kept = [sample for sample in family.samples if not sample.name.endswith("_created")]
                family.samples = [sample._replace(labels=self._labels | sample.labels) for sample in kept]
                yield family
