"""Drafting for the engine's rows: who may draft how much, whose prompt the draft reads, who is taught."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.config import EngineConfig
from engine.flight import Flight
from engine.parts import Parts
from engine.scheduler import PlanRow
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import EngineCosts
from engine.speculation.drafters.base import Drafter, Drafts
from engine.speculation.policy import options_of
from engine.speculation.stopwatch import Stopwatch


class Drafting:
    """The drafters and their policy tables. `costs` are the engine's, kept current by it."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self._parts, self._config = parts, config
        self.tables = {
            name: PolicyTable(config.max_num_seqs, parts.target.device, equipment)
            for name, equipment in parts.equipment.items()
        }
        self.costs = EngineCosts()
        self._lately = dict.fromkeys(parts.drafters, True)  # whether any row drafted
        self._asking = Stopwatch()  # for limits, and teaching

    def warm(self) -> None:
        """Readies the drafters and their tables for the configured policy."""
        policy, rows = self._config.policy, self._config.max_num_seqs
        for name, drafter in self._parts.drafters.items():
            table = self.tables[name]
            table.check(policy, options_of(policy, self._config.policy_options))
            drafter.warm(table, policy, rows)
            table.warm(policy, rows)

    def give_back(self, seq: Sequence) -> None:
        """The row has ended."""
        if seq.drafter in self.tables:
            self.tables[seq.drafter].give_back(seq)

    def put_aside(self, seq: Sequence) -> None:
        """The row was preempted."""
        if seq.drafter in self.tables:
            self.tables[seq.drafter].put_aside(seq)

    def seconds_asked(self) -> float:
        """Host seconds that asking and teaching policies took since the last call."""
        return self._asking.lap() + sum(table.asked_while_drafting.lap() for table in self.tables.values())

    def limits(self, decoding: list[Sequence]) -> list[tuple[int, str | None]]:
        """What each decoding row may draft: the policy's wish, within caps and the room that is left."""
        with self._asking:
            wishes = self._wishes(decoding)
        return [(0, None) if seq.id not in wishes else self._bounded(seq, wishes[seq.id]) for seq in decoding]

    def _wishes(self, decoding: list[Sequence]) -> dict[str, int]:
        wishes: dict[str, int] = {}
        for name, table in self.tables.items():
            mine = [seq for seq in decoding if seq.drafter == name]
            if mine:
                table.load.refresh(self.costs.drafts[name], self.costs.verify, len(decoding), mix(decoding))
                for seq in mine:
                    if seq.slot < 0:
                        table.take(seq)
                asked = table.limits(mine)
                wishes |= zip([seq.id for seq in mine], asked, strict=True)
                self._lately[name] = any(map(min, asked, [seq.max_sl for seq in mine]))
        return wishes

    def _bounded(self, seq: Sequence, wish: int) -> tuple[int, str | None]:
        # A draft of k emits up to k + 1 tokens and writes KV for the newest token and all k.
        room = min(
            seq.params.max_tokens - seq.generated - 1,
            self._parts.info.max_model_len - len(seq.tokens) - 1,
            self._parts.drafters[seq.drafter].room(seq),
        )
        return min((wish, "policy"), (seq.max_sl, "cap"), (max(room, 0), "room"), key=lambda bound: bound[0])

    def begin(self, rows: list[PlanRow]) -> list[tuple[list[PlanRow], Drafts]]:
        """A chain for every row that may draft; what the drafter has not seen of it is read first."""
        for row in rows:
            row.draft.stop_reason = row.sl_reason
        begun = []
        for name, drafter in self._parts.drafters.items():
            mine = [row for row in rows if row.sl > 0 and row.seq.drafter == name]
            unread = [(row.seq, len(row.seq.tokens) - 1) for row in mine if drafter.lags(row.seq)]
            if unread:
                drafter.read(unread, self._parts.token_budget)
            chosen = []
            for row in mine:
                if drafter.lags(row.seq):  # by more than one pass reads: the rest in the next iterations
                    row.draft.stop_reason = "room"
                else:
                    chosen.append(row)
            if chosen:
                limits = [row.sl for row in chosen]
                begun.append((chosen, drafter.begin([row.seq for row in chosen], limits, self.tables[name])))
        return begun

    def finish(self, flight: Flight) -> None:
        """Waits for the drafts that were begun."""
        for chosen, wait in flight.drafts:
            drafted = wait()
            for row, draft in zip(chosen, drafted.rows, strict=True):
                draft.stop_reason = draft.stop_reason or row.sl_reason
                row.draft = draft
                if row.seq.constraint is not None:
                    row.seq.constraint.trim(row.seq, draft)
            for count, seconds in drafted.steps:
                self.costs.drafts[chosen[0].seq.drafter].observe(count, count, seconds)

    def prompts_to_read(self, rows: list[PlanRow]) -> list[tuple[Drafter, list[tuple[Sequence, int]]]]:
        """What drafters read beside the target, for those rows that will draft by all that is known."""
        found = []
        for name, drafter in self._parts.drafters.items():
            mine = [
                row
                for row in rows
                if not row.decodes and row.seq.drafter == name
                if row.seq.max_sl > 0 and row.seq.params.max_tokens > 2 and self._drafts(row.seq)
            ]
            if mine:
                found.append((drafter, [(row.seq, row.seq.kv_len + row.tokens) for row in mine]))
        return found

    def _drafts(self, seq: Sequence) -> bool:
        """Whether its policy lets it draft; one that learns, if it let any row lately."""
        table = self.tables[seq.drafter]
        if table.learns(seq):
            return self._lately[seq.drafter]
        with self._asking:
            if seq.slot < 0:
                table.take(seq)
            return table.limits([seq]) != [0]

    def teach_ahead(self, rows: list[PlanRow], answer: Tensor) -> bool:
        """Tells the policies of verdicts that only the device knows yet.

        answer int32[3, >= rows]: tokens that stand, the next token, whether the row is sound. False if that
        could not be: `teach` must be called.
        """
        learning = [(name, table, self._learning(name, rows)) for name, table in self.tables.items()]
        learning = [each for each in learning if each[2]]
        if len(learning) != 1 or len(learning[0][2]) < len(rows):
            return not learning
        drafted = [row.draft.drafted for row in rows]
        with self._asking:
            return learning[0][1].observe_ahead([row.seq for row in rows], drafted, answer[::2, : len(rows)])

    def teach(self, rows: list[PlanRow]) -> None:
        """Tells the policies that learn what became of these rows' drafts."""
        for name, table in self.tables.items():
            learning = [row for row in self._learning(name, rows) if not row.failed]
            if learning:
                drafted, accepted = [r.draft.drafted for r in learning], [r.accepted for r in learning]
                with self._asking:
                    table.observe([row.seq for row in learning], drafted, accepted)

    def _learning(self, drafter: str, rows: list[PlanRow]) -> list[PlanRow]:
        table = self.tables[drafter]
        return [row for row in rows if row.decodes and row.seq.drafter == drafter and table.learns(row.seq)]

    def observe_costs(self, rows: list[PlanRow], flight: Flight) -> None:
        """Only of iterations without prefill: what verifying alone took, and what they gave."""
        if all(row.decodes for row in rows):
            emitted, seconds = sum(len(row.new) for row in rows), flight.verified - flight.begin
            policies = mix([row.seq for row in rows])
            for table in self.tables.values():
                table.load.observe(len(rows), emitted, seconds, policies)
            tokens = len(rows) + sum(len(row.draft.tokens) for row in rows)
            self.costs.verify.observe(len(rows), tokens, flight.verified - flight.drafted)

    def price(self, rows: list[PlanRow], flight: Flight, rest: float) -> None:
        """Notes what a token would have cost without drafts: see `StepStats`. `rest`: seconds of the step.

        Prompts that ran in the same pass would have run without drafts too: what the pass took beyond the
        known cost of its decoding rows.
        """
        decoding = [row for row in rows if row.samples and row.seq.started and not row.first]
        count = len(decoding)
        plain = self.costs.verify.cost(count, count) if count else None
        if plain is None:
            return
        flight.plain_seconds = (plain + rest) / count
        if len(decoding) < len(rows) or not all(row.decodes for row in rows):
            tokens = count + sum(len(row.draft.tokens) for row in decoding)
            known = self.costs.verify.cost(count, tokens) or 0.0
            flight.other_seconds = max(flight.verified - flight.drafted - known, 0.0) / count


def mix(seqs: Seq[Sequence]) -> frozenset[str]:
    """Who stops the drafts of these rows."""
    return frozenset("none" if seq.drafter == "none" else seq.policy for seq in seqs)
