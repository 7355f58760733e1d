"""vLLM's names for what our metrics hold, for dashboards and tools: `--metrics-compat vllm`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_GAUGES = {
    "disco_requests_running": "num_requests_running",
    "disco_requests_waiting": "num_requests_waiting",
    "disco_kv_usage_ratio": "kv_cache_usage_perc",
}
_COUNTERS = {
    "disco_prompt_tokens": "prompt_tokens",
    "disco_generated_tokens": "generation_tokens",
    "disco_draft_tokens": "spec_decode_num_draft_tokens",
    "disco_accepted_tokens": "spec_decode_num_accepted_tokens",
}
_HISTOGRAMS = {
    "disco_time_to_first_token_seconds": "time_to_first_token_seconds",
    "disco_inter_token_latency_seconds": "inter_token_latency_seconds",
    "disco_request_seconds": "e2e_request_latency_seconds",
    "disco_request_queue_seconds": "request_queue_time_seconds",
}


class VllmNames(Collector):
    """A second view of what `registry` holds: nothing is counted twice. Sums over policies and drafters."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry, self._model = registry, model

    def collect(self) -> Iterator[Metric]:
        """vLLM's families, as far as we have what they tell."""
        model = self._model
        for family in self._registry.collect():
            name = family.name
            if name in _GAUGES:
                gauge = GaugeMetricFamily(*self._named(_GAUGES[name], family))
                gauge.add_metric([model], _sum(family, name))
                yield gauge
            elif name in _COUNTERS:
                counter = CounterMetricFamily(*self._named(_COUNTERS[name], family))
                counter.add_metric([model], _sum(family, f"{name}_total"))
                yield counter
            elif name in _HISTOGRAMS:
                yield self._histogram(family)
            elif name == "disco_position_drafted":
                # a draft is an iteration that drafted a first token
                yield self._drafts(family)
            elif name == "disco_position_accepted":
                positions = _by(family, f"{name}_total", "position")
                counted = {str(int(place) - 1): value for place, value in positions.items()}  # theirs from 0
                yield self._by_label("spec_decode_num_accepted_tokens_per_pos", family, "position", counted)
            elif name == "disco_requests":
                outcomes = _by(family, f"{name}_total", "outcome")
                yield self._by_label("request_success", family, "finished_reason", outcomes)

    def _named(self, name: str, family: Metric, *more: str) -> tuple[str, str, None, tuple[str, ...]]:
        return f"vllm:{name}", family.documentation, None, ("model_name", *more)

    def _drafts(self, family: Metric) -> Metric:
        found = CounterMetricFamily(*self._named("spec_decode_num_drafts", family))
        found.add_metric([self._model], _by(family, f"{family.name}_total", "position").get("1", 0.0))
        return found

    def _by_label(self, name: str, family: Metric, label: str, values: dict[str, float]) -> Metric:
        found = CounterMetricFamily(*self._named(name, family, label))
        for value, count in values.items():
            found.add_metric([self._model, value], count)
        return found

    def _histogram(self, family: Metric) -> Metric:
        buckets = [(s.labels["le"], s.value) for s in family.samples if s.name == f"{family.name}_bucket"]
        name, text, _, labels = self._named(_HISTOGRAMS[family.name], family)
        found = HistogramMetricFamily(name, text, labels=labels)
        found.add_metric([self._model], buckets, _sum(family, f"{family.name}_sum"))
        return found


def _sum(family: Metric, sample: str) -> float:
    return sum(each.value for each in family.samples if each.name == sample)


def _by(family: Metric, sample: str, label: str) -> dict[str, float]:
    """Sums of the samples by one of their labels."""
    found: dict[str, float] = {}
    for each in family.samples:
        if each.name == sample:
            found[each.labels[label]] = found.get(each.labels[label], 0.0) + each.value
    return found
