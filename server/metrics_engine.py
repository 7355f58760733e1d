"""What the engine is and what it holds: read when it is asked for, or told by its steps."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.speculation.tree import rules
from engine.types import EngineUnavailable, StepStats
from server.metrics_times import FINE


class EngineMetrics(Collector):
    """One engine. Its sums since start go on over its restarts."""

    def __init__(self, registry: CollectorRegistry, engine: EngineClient, version: str) -> None:
        self._engine, self._version = engine, version
        self._last, self._life = StepStats(), 0  # the last step, and the engine's life it was in
        self._prefix_queries = Counter(
            "disco_prefix_cache_queried_tokens_total",
            "Prompt tokens looked up in the prefix cache",
            registry=registry,
        )
        self._prefix_hits = Counter(
            "disco_prefix_cache_hit_tokens_total", "Prompt tokens found there", registry=registry
        )
        self._preemptions = Counter(
            "disco_preemptions_total", "Sequences put back for want of KV blocks", registry=registry
        )
        self._faults = Counter(
            "disco_speculation_faults_total",
            "Faults of drafters and their policies, after which requests go on without drafts",
            ("drafter",),
            registry=registry,
        )
        for drafter in ("model", "ngram", *rules()):
            self._faults.labels(drafter)  # told as 0
        self._steps = Histogram(
            "disco_engine_step_seconds", "Wall time of one engine step", registry=registry, buckets=FINE
        )
        registry.register(self)

    def on_step(self, stats: StepStats) -> None:
        """Takes one engine step in."""
        if stats.rows:
            self._steps.observe(stats.step_seconds)
        # an engine that was started anew counts from zero again
        before = self._last if self._engine.restarts == self._life else StepStats()
        self._prefix_queries.inc(stats.prefix_queries - before.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits - before.prefix_hits)
        self._preemptions.inc(stats.preemptions - before.preemptions)
        for drafter, count in stats.speculation_faults.items():
            self._faults.labels(drafter).inc(count - before.speculation_faults.get(drafter, 0))
        self._last, self._life = stats, self._engine.restarts

    def collect(self) -> Iterator[Metric]:
        """The engine's state. What it holds is 0 once the engine of the last step is gone."""
        engine = self._engine
        ready = engine.state == "ready"
        last = self._last if ready and engine.restarts == self._life else StepStats()
        yield CounterMetricFamily(
            "disco_engine_restarts", "Times the engine was started anew", value=engine.restarts
        )
        for name, text, value in (
            ("engine_up", "1 if the engine is ready", ready),
            ("requests_running", "Sequences in the engine's batch", last.running),
            ("requests_waiting", "Sequences that wait for a place", last.waiting),
            ("kv_blocks", "KV blocks of the pool", last.kv_blocks_total),
            ("kv_blocks_used", "KV blocks in use", last.kv_blocks_used),
            ("kv_usage_ratio", "KV blocks in use, of all", _ratio(last)),
        ):
            yield GaugeMetricFamily(f"disco_{name}", text, value=value)
        yield InfoMetricFamily("disco_model", "The models that are served", value=self._info())

    def _info(self) -> dict[str, str] | None:
        """None before the engine was ready for the first time."""
        try:
            info = self._engine.info
        except EngineUnavailable:
            return None
        return {
            "target": info.target,
            "draft": info.draft or "none",
            "dtype": info.dtype,
            "device": info.device,
            "version": self._version,
        }


def _ratio(stats: StepStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
