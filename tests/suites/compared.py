"""Whether /metrics counted what answers say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families
from suites.accounts import Ask, Told

Samples = dict[tuple[str, ...], float]
"""Values by name and label values, in the order of the labels' names."""


async def scrape(client: httpx.AsyncClient) -> Samples:
    """/metrics as it is now."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def idle(client: httpx.AsyncClient, seconds: float = 60) -> Samples:
    """/metrics once nothing runs any more and nothing changes. Raises TimeoutError."""
    names = ("disco_requests_in_flight", "disco_requests_running", "disco_requests_waiting")
    async with asyncio.timeout(seconds):
        before: Samples = {}
        while True:
            now = await scrape(client)
            same = total(now, "disco_generated_tokens_total") == total(before, "disco_generated_tokens_total")
            if same and not any(now[name,] for name in names):
                return now
            before = now
            await asyncio.sleep(0.2)


def since(before: Samples, after: Samples) -> Samples:
    """What was counted in between."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


@dataclass(frozen=True)
class Line:
    """A figure as the answers have it and as /metrics has it."""

    what: str
    answers: float
    metrics: float

    @property
    def agrees(self) -> bool:
        return self.answers == self.metrics


def total(samples: Samples, name: str, *labels: str) -> float:
    """The sum of a metric over the samples that have these label values."""
    return sum(value for key, value in samples.items() if key[0] == name and set(labels) <= set(key[1:]))


def lines(asks: Sequence[Ask], told: Told, counted: Samples, exact: bool) -> list[Line]:
    """What must agree. `exact`: every request was one of `whole`, so that speculation must agree, too."""
    discarded = "disco_discarded_tokens_total"
    lost = sum(ask.lost for ask in asks)
    given_up = {
        reason: total(counted, discarded, reason) for reason in ("stop_string", "best_of", "aborted", "error")
    }
    generated = total(counted, "disco_generated_tokens_total")
    found = [
        Line("answers, and requests that were left", told.answers + told.left, len(asks)),
        Line("tokens: of answers + discarded = generated", told.tokens + sum(given_up.values()), generated),
        Line("tokens discarded for best_of", lost, given_up["best_of"]),
        Line("tokens discarded for errors", 0, given_up["error"]),
        *_inner(counted),
    ]
    ends = told.finish.copy()
    ends["length"] += sum(ask.body["best_of"] - ask.body["n"] for ask in asks if ask.lost)
    for reason in ("stop", "length"):
        count = total(counted, "disco_requests_total", reason)
        found.append(Line(f"sequences that ended by {reason}", ends[reason], count))
    if exact:
        found.append(
            Line("prompt tokens", told.prompt_tokens, total(counted, "disco_prompt_tokens_total")),
        )
        names = {
            "iterations": "disco_iterations_total",
            "drafted": "disco_draft_tokens_total",
            "accepted": "disco_accepted_tokens_total",
        }
        for (figure, *by), value in sorted(told.speculation.items()):
            count = counted.get((names[figure], *by), 0)
            found.append(Line(f"{figure} of {by[1]} with {by[0]}", value, count))
        for name in ("request_queue", "request_prefill", "request_decode", "request"):
            count = total(counted, f"disco_{name}_seconds_count")
            found.append(Line(f"sequences in {name}_seconds", told.sequences, count))
        gaps = total(counted, "disco_inter_token_latency_seconds_count")
        found.append(Line("gaps between tokens", told.tokens - told.sequences, gaps))
        emitted = told.tokens - told.sequences  # every sequence's first token is prefill's
        found.append(Line("tokens of iterations", emitted, total(counted, "disco_emitted_tokens_total")))
    return found


def _inner(counted: Samples) -> list[Line]:
    """Metrics that must agree among themselves."""
    accepted, iterations = (total(counted, f"disco_{x}_total") for x in ("accepted_tokens", "iterations"))
    chains = _without_trees(counted)
    drafted = total(chains, "disco_draft_tokens_total")
    return [
        Line("iterations, by lookahead", total(counted, "disco_lookahead_count"), iterations),
        Line("draft tokens, by lookahead", total(chains, "disco_lookahead_sum"), drafted),
        Line("draft tokens, by position", total(chains, "disco_position_drafted_total"), drafted),
        Line("accepted tokens, by position", total(counted, "disco_position_accepted_total"), accepted),
    ]


def _without_trees(counted: Samples) -> Samples:
    """Of chains alone: a tree's draft tokens are all its nodes, its lookahead is its longest way."""
    name = "disco_draft_tokens_total"
    trees = {key[1] for key in counted if key[0] == name and key[1] != "none" and key[2] == "none"}
    return {key: value for key, value in counted.items() if len(key) < 3 or key[1] not in trees}
