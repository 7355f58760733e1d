"""Prometheus metrics of one app. Base units; ratios are left to queries; labels are bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.client import EngineClient
from engine.types import StepStats, TokenEvent

_FINE = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
         0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)  # fmt: skip
_LONG = (*_FINE, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_LOOKAHEAD = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)


class Metrics:
    """Counters by registry, so that two apps in one process do not share them.

    Seconds of draft and verify are of the step, split evenly over the rows that decoded in it:
    their sum over policies is wall time.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests_metrics()
        self._engine_metrics()
        self._speculation_metrics()
        self._last, self._last_life = StepStats(), 0  # the last step, and the engine's life it was in
        self._since_start = {"prefix_queries": 0, "prefix_hits": 0, "preemptions": 0}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"disco_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"disco_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"disco_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _requests_metrics(self) -> None:
        self.http_requests = self._counter("http_requests_total", "HTTP answers", "route", "status")
        self.requests = self._counter("requests_total", "Sequences ended, by outcome", "outcome")
        self.in_flight = self._gauge("requests_in_flight", "Sequences that the server waits for")
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of started sequences")
        self.generated_tokens = self._counter("generated_tokens_total", "Tokens that the engine emitted")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", _LONG
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "A gap of N tokens is N observations of gap/N", _FINE
        )
        self.end_to_end = self._histogram("request_seconds", "From arrival to the last token", _LONG)

    def _engine_metrics(self) -> None:
        self.up = self._gauge("engine_up", "1 if the engine is ready")
        self.restarts = self._gauge("engine_restarts", "Times the engine was started anew")
        self.running = self._gauge("requests_running", "Sequences in the engine's batch")
        self.waiting = self._gauge("requests_waiting", "Sequences that wait for a place")
        self.kv_used = self._gauge("kv_blocks_used", "KV blocks in use")
        self.kv_total = self._gauge("kv_blocks", "KV blocks of the pool")
        self.kv_ratio = self._gauge("kv_usage_ratio", "KV blocks in use, of all")
        self.prefix_queries = self._counter("prefix_cache_queried_tokens_total", "Tokens looked up")
        self.prefix_hits = self._counter("prefix_cache_hit_tokens_total", "Tokens found")
        self.preemptions = self._counter("preemptions_total", "Sequences put back for want of blocks")
        self.steps = self._histogram("engine_step_seconds", "Wall time of one engine step", _FINE)

    def _speculation_metrics(self) -> None:
        by = ("policy", "drafter")
        self.iterations = self._counter("speculation_iterations_total", "Decode passes, by row", *by)
        self.drafted = self._counter("speculation_draft_tokens_total", "Draft tokens verified", *by)
        self.accepted = self._counter("speculation_accepted_tokens_total", "Draft tokens emitted", *by)
        self.emitted = self._counter("speculation_emitted_tokens_total", "Tokens of decode passes", *by)
        self.lookahead = self._histogram(
            "speculation_lookahead_tokens", "Draft tokens of one iteration", _LOOKAHEAD, *by
        )
        self.stops = self._counter("speculation_stops_total", "Why drafting ended", "policy", "reason")
        self.draft_seconds = self._counter("speculation_draft_seconds_total", "Time drafting", *by)
        self.verify_seconds = self._counter("speculation_verify_seconds_total", "Time verifying", *by)

    def watch(self, engine: EngineClient) -> None:
        """Follows this engine's steps and state."""
        self.up.set_function(lambda: float(engine.state == "ready"))
        self.restarts.set_function(lambda: float(engine.restarts))
        for gauge, read in (
            (self.running, lambda stats: stats.running),
            (self.waiting, lambda stats: stats.waiting),
            (self.kv_used, lambda stats: stats.kv_blocks_used),
            (self.kv_total, lambda stats: stats.kv_blocks_total),
            (self.kv_ratio, lambda stats: stats.kv_blocks_used / max(stats.kv_blocks_total, 1)),
        ):
            gauge.set_function(partial(self._of_last_step, engine, read))
        engine.on_step(self.on_step)
        engine.on_step(lambda stats, events: self._remember(stats, engine.restarts))

    def _remember(self, stats: StepStats, restarts: int) -> None:
        self._last, self._last_life = stats, restarts

    def _of_last_step(self, engine: EngineClient, read: Callable[[StepStats], float]) -> float:
        """A figure of the last step; 0 once the engine that made the step is gone."""
        alive = engine.state == "ready" and engine.restarts == self._last_life
        return float(read(self._last)) if alive else 0.0

    def on_step(self, stats: StepStats, events: list[TokenEvent]) -> None:
        """Takes one engine step in. Called on the event loop."""
        if stats.rows:
            self.steps.observe(stats.step_seconds)
        self._count_up("prefix_queries", stats.prefix_queries, self.prefix_queries)
        self._count_up("prefix_hits", stats.prefix_hits, self.prefix_hits)
        self._count_up("preemptions", stats.preemptions, self.preemptions)
        decoded = [event for event in events if event.iterations]
        for event in decoded:
            self._speculated(event, stats, len(decoded))

    def _speculated(self, event: TokenEvent, stats: StepStats, rows: int) -> None:
        by = (event.policy, event.drafter)
        self.iterations.labels(*by).inc(event.iterations)
        self.drafted.labels(*by).inc(event.drafted)
        self.accepted.labels(*by).inc(event.accepted)
        self.emitted.labels(*by).inc(len(event.token_ids))
        self.lookahead.labels(*by).observe(event.drafted)
        self.draft_seconds.labels(*by).inc(stats.draft_seconds / rows)
        self.verify_seconds.labels(*by).inc(stats.verify_seconds / rows)
        if event.stop_reason is not None:
            self.stops.labels(event.policy, event.stop_reason).inc()

    def _count_up(self, name: str, now: int, counter: Counter) -> None:
        before = self._since_start[name]
        # an engine that was started anew counts from zero again
        counter.inc(now - before if now >= before else now)
        self._since_start[name] = now

    def tokens(self, count: int, gap: float, *, first: bool) -> None:
        """`count` tokens reached the server `gap` seconds after the arrival (first) or the last ones."""
        self.generated_tokens.inc(count)
        if first:
            self.first_token.observe(gap)
            count, gap = count - 1, 0.0  # the rest of a first block came with it
        for _ in range(count):
            self.inter_token.observe(gap / count)
