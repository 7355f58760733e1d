"""What an iteration took and gave, for who decides by costs, and what its tokens would have cost alone."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from engine.flight import Flight
from engine.scheduler import PlanRow
from engine.sequence import Sequence
from engine.speculation.costs import EngineCosts
from engine.speculation.load import Load
from engine.speculation.tree import rules


def observe(costs: EngineCosts, loads: Iterable[Load], rows: list[PlanRow], flight: Flight) -> None:
    """Only of iterations without prefill: what verifying alone took, and what they gave."""
    if all(row.decodes for row in rows):
        emitted, seconds = sum(len(row.new) for row in rows), flight.verified - flight.begin
        policies = mix([row.seq for row in rows])
        for load in loads:
            load.observe(len(rows), emitted, seconds, policies)
        tokens = len(rows) + sum(len(row.draft.tokens) for row in rows)
        costs.verify.observe(len(rows), tokens, flight.verified - flight.drafted)


def price(costs: EngineCosts, rows: list[PlanRow], flight: Flight, rest: float) -> None:
    """Notes what a token would have cost without drafts: see `StepStats`. `rest`: seconds of the step.

    Prompts that ran in the same pass would have run without drafts too: what the pass took beyond the
    known cost of its decoding rows.
    """
    decoding = [row for row in rows if row.samples and row.seq.started and not row.first]
    count = len(decoding)
    plain = costs.verify.cost(count, count) if count else None
    if plain is None:
        return
    flight.plain_seconds = (plain + rest) / count
    if len(decoding) < len(rows) or not all(row.decodes for row in rows):
        tokens = count + sum(len(row.draft.tokens) for row in decoding)
        known = costs.verify.cost(count, tokens) or 0.0
        flight.other_seconds = max(flight.verified - flight.drafted - known, 0.0) / count


def mix(seqs: Seq[Sequence]) -> frozenset[str]:
    """Who stops the drafts of these rows."""
    return frozenset(
        seq.drafter if seq.drafter == "none" or seq.drafter in rules() else seq.policy for seq in seqs
    )
