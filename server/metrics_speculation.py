"""What speculation did, by policy and drafter: counted from the engine's events, a step at a time."""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram

from engine.types import StepStats, TokenEvent
from server.metrics_window import By, Window

PHASES = ("draft", "verify", "decide", "wait")
_LOOKAHEAD = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_BY = ("policy", "drafter")


@dataclass
class _Sums:
    """Of the rows of one policy and drafter in one step."""

    iterations: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    baseline: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by phase
    lookaheads: list[int] = field(default_factory=list)
    accepts: list[int] = field(default_factory=list)
    reasons: Tally[str] = field(default_factory=Tally)
    decisions: Tally[tuple[str, str]] = field(default_factory=Tally)


class Speculation:
    """The counters. A step's seconds are shared out among its rows, so that their sum is wall time: drafting
    among those that drafted, deciding among those with a drafter, the rest among all that decoded.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"disco_{name}", text, (*_BY, *more), registry=registry)

        self.iterations = counter("iterations_total", "Decode passes, by row")
        self.drafted = counter("draft_tokens_total", "Draft tokens, of trees all nodes")
        self.accepted = counter("accepted_tokens_total", "Draft tokens that were accepted and emitted")
        self.emitted = counter("emitted_tokens_total", "Tokens of decode passes")
        self.lookahead = Histogram(
            "disco_lookahead",
            "Draft tokens of one iteration, on the longest way",
            _BY,
            registry=registry,
            buckets=_LOOKAHEAD,
        )
        self.position_drafted = counter("position_drafted_total", "Drafts as long as a position", "position")
        self.position_accepted = counter(
            "position_accepted_total", "Drafts whose token at a position was accepted", "position"
        )
        self.reasons = counter("stop_reason_total", "Why drafting ended", "reason")
        self.seconds = counter("iteration_seconds_total", "Time of decoding, by phase", "phase")
        self.baseline = counter(
            "baseline_seconds_total",
            "What the tokens would have cost without a draft, by the cost table",
        )
        self.decisions = counter(
            "stop_decisions_total",
            "What policies decided after a draft token, and what became of the token",
            "decision",
            "verdict",
        )
        self.window = Window()
        registry.register(self.window)

    def on_step(self, stats: StepStats, events: Sequence[TokenEvent]) -> None:
        """Takes one engine step in."""
        decoded = [event for event in events if event.iterations]
        if not decoded:
            return
        found: dict[By, _Sums] = {}
        for event in decoded:
            _add(found.setdefault((event.policy, event.drafter), _Sums()), event)
        rest = stats.step_seconds - stats.draft_seconds - stats.decide_seconds - stats.verify_seconds
        drafting = [event for event in decoded if event.drafted] or decoded
        asking = [event for event in decoded if event.drafter != "none"] or decoded
        for phase, seconds, rows in (
            ("draft", stats.draft_seconds, drafting),
            ("decide", stats.decide_seconds, asking),
            ("verify", stats.verify_seconds, decoded),
            ("wait", max(rest, 0.0), decoded),
        ):
            for event in rows:
                found[event.policy, event.drafter].seconds[phase] += seconds / len(rows)
        for by, sums in found.items():
            self._count(by, sums)

    def _count(self, by: By, sums: _Sums) -> None:
        self.iterations.labels(*by).inc(sums.iterations)
        self.drafted.labels(*by).inc(sums.drafted)
        self.accepted.labels(*by).inc(sums.accepted)
        self.emitted.labels(*by).inc(sums.emitted)
        self.baseline.labels(*by).inc(sums.baseline)
        lookahead = self.lookahead.labels(*by)
        for length in sums.lookaheads:
            lookahead.observe(length)
        for counter, lengths in (
            (self.position_drafted, sums.lookaheads),
            (self.position_accepted, sums.accepts),
        ):
            for position in range(1, max(sums.lookaheads) + 1):  # of none accepted, 0 is told
                counter.labels(*by, position).inc(sum(length >= position for length in lengths))
        for reason, count in sums.reasons.items():
            self.reasons.labels(*by, reason).inc(count)
        for decided in product(("stop", "continue"), ("accepted", "rejected")):
            self.decisions.labels(*by, *decided).inc(sums.decisions[decided])
        for phase in PHASES:
            self.seconds.labels(*by, phase).inc(sums.seconds[phase])
        spent = sum(sums.seconds.values())
        lookaheads = sum(sums.lookaheads)
        self.window.add(by, sums.drafted, sums.accepted, lookaheads, sums.iterations, sums.baseline, spent)


def _add(sums: _Sums, event: TokenEvent) -> None:
    sums.iterations += event.iterations
    sums.drafted += event.drafted
    sums.accepted += event.accepted
    sums.emitted += len(event.token_ids)
    sums.baseline += event.baseline_seconds
    sums.lookaheads.append(event.lookahead)
    sums.accepts.append(event.accepted)
    if event.stop_reason is not None:
        sums.reasons[event.stop_reason] += 1
    sums.decisions.update(decisions(event))


def decisions(event: TokenEvent) -> Iterator[tuple[str, str]]:
    """What the policy decided after each draft token of an iteration, and the target's verdict on the token.

    Only of tokens whose predecessors were all accepted, since the others have no verdict; nor has a token
    behind the output's end. Behind the last token the policy decided only where it was the one to stop.
    No policy decides on the nodes of a tree.
    """
    if event.policy == "none":
        return
    last, stopped = event.drafted, event.stop_reason == "policy"
    yield from [("continue", "accepted")] * min(event.accepted, last - 1)
    if event.accepted == last:
        if last and stopped:
            yield "stop", "accepted"
    elif len(event.token_ids) > event.accepted:  # the target's own token stands in its place
        if event.accepted + 1 < last:
            yield "continue", "rejected"
        elif stopped:
            yield "stop", "rejected"
