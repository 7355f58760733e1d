"""A running server's metrics page, and what changed between two of them."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from server.log_lines import one_line

Labels = Mapping[str, str]
_MOST = 1e18  # that a sample of ours can be


class NotOurs(ValueError):
    """The page is no metrics of disco-serve, or cannot be read."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message[:300]))


class Page:
    """The samples of one page, read at `time` (seconds of one clock). Raises NotOurs."""

    def __init__(self, text: str, time: float) -> None:
        self.time = time
        self._samples: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith("disco_"):
                        self._add(sample.name, sample.labels, sample.value)
        except NotOurs:
            raise
        except Exception as error:  # the parser raises what it comes upon
            raise NotOurs(f"not a page of metrics: {error or type(error).__name__}") from error
        if "disco_engine_up" not in self._samples:
            raise NotOurs("no metrics of disco-serve on this page (there is no disco_engine_up)")

    def _add(self, name: str, labels: Labels, value: float) -> None:
        if not abs(value) <= _MOST:
            raise NotOurs(f"these metrics cannot be read: {name} is {value}")
        if name.endswith("_bucket") and math.isnan(_bound(labels.get("le", ""))):
            raise NotOurs(f"these metrics cannot be read: {name} has a bound {labels.get('le')!r}")
        self._samples[name][frozenset((key, one_line(text)) for key, text in labels.items())] = value

    def samples(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and values of a name, without its prefix."""
        for labels, value in self._samples.get(f"disco_{name}", {}).items():
            yield dict(labels), value

    def value(self, name: str) -> float | None:
        """The sum over all labels; None if the page does not have it."""
        values = [value for _, value in self.samples(name)]
        return sum(values) if values else None

    def info(self) -> dict[str, str]:
        """The labels of `disco_model_info`; empty before the engine was ready."""
        return next((labels for labels, _ in self.samples("model_info")), {})

    def since(self, old: Page, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """How much each counter of a name grew; one that fell began anew at zero."""
        before = old._samples.get(f"disco_{name}", {})
        for labels, value in self._samples.get(f"disco_{name}", {}).items():
            start = before.get(labels, 0.0)
            yield dict(labels), value - start if value >= start else value


@dataclass(frozen=True)
class Quantiles:
    """Of a histogram, in its unit. A quantile in the last bucket is infinite: no bound is known."""

    count: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speculated:
    """What one policy with one drafter did. A ratio of nothing is None."""

    policy: str
    drafter: str
    iterations: float
    emitted: float
    acceptance: float | None
    mean_sl: float | None
    mean_emitted: float | None
    speedup: float | None
    precision: float | None
    recall: float | None
    phases: dict[str, float]  # shares of the time


class Window:
    """The pages of the last `seconds`; the oldest and the newest are compared."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pages: deque[Page] = deque()

    def add(self, page: Page) -> None:
        self._pages.append(page)
        while len(self._pages) > 2 and page.time - self._pages[1].time >= self._seconds:
            self._pages.popleft()

    @property
    def new(self) -> Page:
        return self._pages[-1]

    @property
    def seconds(self) -> float:
        """Between the pages that are compared."""
        return self.new.time - self._pages[0].time

    def grown(self, name: str, by: str | tuple[str, ...] = (), **only: str) -> dict[tuple[str, ...], float]:
        """The growth of a counter, summed by the labels of `by`, over samples with the labels `only`."""
        keys = (by,) if isinstance(by, str) else by
        sums: dict[tuple[str, ...], float] = defaultdict(float)
        for labels, value in self.new.since(self._pages[0], name):
            if all(labels.get(key) == wanted for key, wanted in only.items()):
                sums[tuple(labels.get(key, "") for key in keys)] += value
        return sums

    def total(self, name: str, **only: str) -> float:
        return sum(self.grown(name, **only).values())

    def rate(self, name: str, **only: str) -> float | None:
        """A second; None before there are two pages, or without such a counter."""
        if not self.seconds or self.new.value(name) is None:
            return None
        return self.total(name, **only) / self.seconds

    def ratio(self, part: str, whole: str, **only: str) -> float | None:
        """Of what two counters grew by."""
        return _ratio(self.total(part, **only), self.total(whole, **only))

    def quantiles(self, name: str) -> Quantiles | None:
        """Of a histogram's observations within the window, None without any."""
        grown = self.grown(f"{name}_bucket", "le")
        buckets = sorted((float(bound), count) for (bound,), count in grown.items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        at = [quantile(buckets, share) for share in (0.5, 0.9, 0.99)]
        return Quantiles(round(buckets[-1][1]), *at)

    def speculated(self) -> list[Speculated]:
        """By policy and drafter, those that did anything within the window."""
        passes = self.grown("iterations_total", ("policy", "drafter"))
        return [self._speculated(*by) for by, count in sorted(passes.items()) if count]

    def _speculated(self, policy: str, drafter: str) -> Speculated:
        own = {"policy": policy, "drafter": drafter}
        times = {
            phase: took for (phase,), took in self.grown("iteration_seconds_total", "phase", **own).items()
        }
        whole = sum(times.values())
        judged = self.grown("stop_decisions_total", ("decision", "verdict"), **own)
        caught = judged[("stop", "rejected")]
        return Speculated(
            policy=policy,
            drafter=drafter,
            iterations=self.total("iterations_total", **own),
            emitted=self.total("emitted_tokens_total", **own),
            acceptance=self.ratio("accepted_tokens_total", "draft_tokens_total", **own),
            mean_sl=self.ratio("lookahead_sum", "iterations_total", **own),
            mean_emitted=self.ratio("emitted_tokens_total", "iterations_total", **own),
            speedup=_ratio(self.total("baseline_seconds_total", **own), whole) or None,
            precision=_ratio(caught, caught + judged[("stop", "accepted")]),
            recall=_ratio(caught, caught + judged[("continue", "rejected")]),
            phases={phase: took / whole for phase, took in times.items()} if whole else {},
        )


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """By linear interpolation within its bucket, as Prometheus does; `buckets` are bounds in order with
    how many observations are at most that. Infinite if only the last bucket has it."""
    rank = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            if math.isinf(bound):
                return math.inf
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return math.inf


def _bound(text: str) -> float:
    """Of a bucket; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
