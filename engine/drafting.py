"""Drafting for the engine's rows: who may draft how much, whose prompt the draft reads, who is taught.

Here faults of drafters and policies end: nothing is raised but what is fatal to the target, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from engine.config import EngineConfig
from engine.flight import Flight
from engine.pairing import chain_options
from engine.parts import Parts
from engine.pricing import mix
from engine.scheduler import PlanRow
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import EngineCosts
from engine.speculation.drafters.base import Drafted, Drafter, Drafts, RowDraft
from engine.speculation.drafters.tree import TreeDrafter
from engine.speculation.faults import DraftFault, Faults, PolicyFault
from engine.speculation.policy import options_of
from engine.speculation.stopwatch import Stopwatch
from engine.speculation.tree import rules
from engine.speculation.tree_table import TreeTable

T = TypeVar("T")

_LOOK = 10.0  # seconds between looks at what policies have learned


class Drafting:
    """The drafters and their policy tables. `costs` are the engine's, kept current by it."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self._parts, self._config = parts, config
        self.tables: dict[str, PolicyTable | TreeTable] = {
            name: PolicyTable(config.max_num_seqs, parts.target.device, equipment)
            for name, equipment in parts.equipment.items()
        }
        self.tables |= {name: each.table() for name, each in rules().items() if name in parts.drafters}
        for table in self.tables.values():
            if isinstance(table, TreeTable):
                table.join(self._chains)
        self.costs = EngineCosts()
        self._lately = dict.fromkeys(parts.drafters, True)  # whether any row drafted
        self._asking = Stopwatch()  # for limits, and teaching
        self.faults = Faults()
        self._looked = time.monotonic()

    @property
    def _chains(self) -> PolicyTable:
        """What governs the draft model's chains; KeyError without a draft model."""
        table = self.tables["model"]
        assert isinstance(table, PolicyTable)
        return table

    def _maker(self, name: str) -> str:
        """Who drafts now for the rows of this drafter: those of trees may get chains."""
        table = self.tables[name]
        return "model" if isinstance(table, TreeTable) and table.chained else name

    def warm(self) -> None:
        """Readies the drafters and their tables for the configured policy."""
        policy, rows = self._config.policy, self._config.max_num_seqs
        for name, drafter in self._parts.drafters.items():
            table = self.tables[name]
            table.check(policy, options_of(policy, chain_options(self._config)))
            drafter.warm(table, policy, rows)
            table.warm(policy, rows)
        default = rules().get(self._parts.info.default_drafter)
        if default is not None and default.chains != "none":
            self._parts.drafters["model"].warm(self._chains, default.chains, rows)
            self._chains.warm(default.chains, rows)

    def check(self, drafter: str, policy: str, options: object) -> None:
        """Raises InvalidRequest for options that the policy cannot compute with."""
        if drafter in self.tables and not self.faults.off(drafter, policy):
            try:
                self.tables[drafter].check(policy, options)
            except PolicyFault as fault:
                self.faults.met(drafter, fault)

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
            self._look()
            wishes = self._wishes(decoding)
        return [
            self._bounded(seq, wishes[seq.id]) if seq.id in wishes else (0, self._why(seq))
            for seq in decoding
        ]

    def _wishes(self, decoding: list[Sequence]) -> dict[str, int]:
        wishes: dict[str, int] = {}
        for name, table in self._in_turn(self.tables).items():
            while mine := [seq for seq in decoding if self._trusted(seq) and self._asks(seq, name)]:
                try:
                    for each in {name, "model"} if name in rules() else {name}:  # chains may pay more
                        draft, verify = self.costs.drafts[each], self.costs.verify
                        load = self.tables[each].load
                        load.refresh(draft, verify, len(decoding), mix(decoding))
                    for seq in mine:
                        if seq.slot < 0:
                            self.tables[seq.drafter].take(seq)
                    asked = table.limits(mine)
                except Exception as error:
                    self._met(mine, error)
                    continue  # without those whose fault it was
                wishes |= zip([seq.id for seq in mine], asked, strict=True)
                for drafter in {seq.drafter for seq in mine}:
                    self._lately[drafter] = any(
                        min(wish, seq.max_sl)
                        for seq, wish in zip(mine, asked, strict=True)
                        if seq.drafter == drafter
                    )
                break
        return wishes

    def _asks(self, seq: Sequence, name: str) -> bool:
        """Whether this table is to be asked what the row may draft: its drafter's, then its chains'."""
        return seq.drafter in self.tables and name in (seq.drafter, self._maker(seq.drafter))

    @staticmethod
    def _in_turn(by_name: Mapping[str, T]) -> dict[str, T]:
        """The draft model's chains come last: trees' rows may join them, and nobody else may use the draft
        while its loop runs."""
        return dict(sorted(by_name.items(), key=lambda each: each[0] == "model"))

    def _met(self, seqs: list[Sequence], error: Exception) -> None:
        """Notes a fault of those who drafted, or decided, for these rows."""
        to_blame = [seq for seq in seqs if not isinstance(error, PolicyFault) or error.policy == seq.policy]
        for drafter in sorted({seq.drafter for seq in to_blame or seqs}):
            self.faults.met(drafter, error)

    def _trusted(self, seq: Sequence) -> bool:
        return not (seq.mistrusted or self.faults.off(seq.drafter, seq.policy))

    def _why(self, seq: Sequence) -> str | None:
        """Why a row that was not asked does not draft: it has no drafter, or a fault was met."""
        return "drafter" if seq.drafter in self.tables else None

    def _look(self) -> None:
        """Now and then: a policy that has learned NaN would stop drafting for good, and say nothing."""
        if time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            for name, table in self.tables.items():
                for policy in table.heal():
                    self.faults.met(name, PolicyFault(policy, "what it has learned is not finite: forgotten"))

    def _bounded(self, seq: Sequence, wish: int) -> tuple[int, str | None]:
        # A draft of k emits up to k + 1 tokens and writes KV for the newest token and all k.
        left = self._parts.info.max_model_len - len(seq.tokens) - 1
        room = min(
            seq.params.max_tokens - seq.generated - 1, left, self._parts.drafters[seq.drafter].room(seq)
        )
        if self._maker(seq.drafter) in rules() and min(seq.max_sl, room) > 0:  # they bound the tree's depth
            return min((wish, "policy"), (max(left, 0), "room"), key=lambda bound: bound[0])
        return min((wish, "policy"), (seq.max_sl, "cap"), (max(room, 0), "room"), key=lambda bound: bound[0])

    def begin(self, rows: list[PlanRow]) -> list[tuple[str, list[PlanRow], Drafts]]:
        """A draft for every row that may have one; what the drafter has not seen of it is read first."""
        for row in rows:
            row.draft.stop_reason = row.sl_reason
        begun, ready = [], self._ready(rows)
        for maker, drafter in self._in_turn(self._parts.drafters).items():
            chosen = [row for row in ready if self._maker(row.seq.drafter) == maker]
            if chosen:
                seqs, limits = [row.seq for row in chosen], [row.sl for row in chosen]
                read = [seq.draft_kv_len for seq in seqs]
                try:
                    begun.append((maker, chosen, drafter.begin(seqs, limits, self.tables[maker])))
                except Exception as error:
                    self._fell(error, seqs, read)
        return begun

    def _ready(self, rows: list[PlanRow]) -> list[PlanRow]:
        """Those of the rows that may draft, of which all but a little has been read."""
        found = []
        for name, drafter in self._parts.drafters.items():
            mine = [row for row in rows if row.sl > 0 and row.seq.drafter == name]
            unread = [(row.seq, len(row.seq.tokens) - 1) for row in mine if drafter.lags(row.seq)]
            if unread:
                self._read(drafter, unread)
            for row in mine:
                if drafter.lags(row.seq):  # by more than one pass reads: the rest in the next iterations
                    row.draft.stop_reason = "room"
                elif not self.faults.off(name, ""):
                    found.append(row)
        return found

    def _read(self, drafter: Drafter, rows: list[tuple[Sequence, int]]) -> None:
        seqs = [seq for seq, _ in rows]
        read = [seq.draft_kv_len for seq in seqs]
        try:
            drafter.read(rows, self._parts.token_budget)
        except Exception as error:
            self._fell(error, seqs, read)

    def _fell(self, error: Exception, seqs: list[Sequence], read: list[int]) -> None:
        """Drafting raised: what was read of these rows is what was before."""
        self._met(seqs, error)
        for seq, length in zip(seqs, read, strict=True):
            seq.draft_kv_len = min(length, seq.draft_kv_len)

    def finish(self, flight: Flight) -> None:
        """Waits for the drafts that were begun."""
        for maker, chosen, wait in flight.drafts:
            drafted = self._drafted(chosen, wait)
            for row, draft in zip(chosen, drafted.rows, strict=True):
                draft.stop_reason = draft.stop_reason or row.sl_reason
                row.draft = draft
                if row.seq.constraint is not None and draft.parents is None:  # trees are drafted under it
                    row.seq.constraint.trim(row.seq, draft)
            for count, seconds in drafted.steps:
                self.costs.drafts[maker].observe(count, count, seconds)

    def _drafted(self, rows: list[PlanRow], wait: Drafts) -> Drafted:
        """What came of a draft, after a fault without those rows' trust in it."""
        seqs = [row.seq for row in rows]
        read = [seq.draft_kv_len for seq in seqs]
        try:
            drafted = wait()
        except Exception as error:
            self._fell(error, seqs, read)
            return Drafted([RowDraft(stop_reason="drafter") for _ in rows])
        if drafted.fault is not None:
            self._met(seqs, drafted.fault)
        unsound = [seq for seq, draft in zip(seqs, drafted.rows, strict=True) if draft.unsound]
        for seq in unsound:  # its draft KV may hold NaN, which no other request is to find in a cached block
            seq.mistrusted = True
            seq.draft_kv_len = 0 if seq.table is None else seq.table.draft_tokens
        if unsound:
            self._met(unsound, DraftFault(f"the draft of {len(unsound)} of {len(rows)} rows gave NaN"))
        return drafted

    def settle(self, rows: list[PlanRow]) -> None:
        """Tells tree drafters which ways were accepted, before the rows get their tokens."""
        for row in rows:
            drafter, table = self._parts.drafters[row.seq.drafter], self.tables[row.seq.drafter]
            if isinstance(drafter, TreeDrafter) and isinstance(table, TreeTable):
                try:
                    if row.draft.parents is not None and not row.draft.unsound:
                        drafter.settle(row.seq, row.draft, row.path)
                    table.judged(row.seq, row.draft, row.path)
                except Exception as error:
                    sure = 0 if row.seq.table is None else row.seq.table.draft_tokens
                    self._fell(error, [row.seq], [sure])

    def read(self, prompts: list[tuple[Drafter, list[tuple[Sequence, int]]]]) -> None:
        """Queues the reading of `prompts_to_read`."""
        for drafter, begun in prompts:
            self._read(drafter, begun)

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
        if not self._trusted(seq):
            return False
        try:
            if table.learns(seq):
                return self._lately[seq.drafter]
            with self._asking:
                if seq.slot < 0:
                    table.take(seq)
                return table.limits([seq]) != [0]
        except Exception as error:
            self.faults.met(seq.drafter, error)
            return False

    def teach_ahead(self, rows: list[PlanRow], answer: Tensor) -> bool:
        """Tells the policies of verdicts that only the device knows yet.

        answer int32[>= 3, >= rows]: tokens that stand, the next token, whether the row is sound. False if
        that could not be: `teach` must be called.
        """
        learning = [(name, table, self._learning(name, rows)) for name, table in self.tables.items()]
        learning = [each for each in learning if each[2]]
        if len(learning) != 1 or len(learning[0][2]) < len(rows):
            return not learning
        drafted = [row.draft.drafted for row in rows]
        _, table, _ = learning[0]
        try:
            with self._asking:
                return table.observe_ahead([row.seq for row in rows], drafted, answer[:3:2, : len(rows)])
        except Exception as error:
            self._met([row.seq for row in rows], error)
            return True  # nobody is to be told

    def teach(self, rows: list[PlanRow]) -> None:
        """Tells the policies that learn what became of these rows' drafts."""
        for name, table in self.tables.items():
            learning = [row for row in self._learning(name, rows) if not row.failed]
            if learning:
                drafted, accepted = [r.draft.drafted for r in learning], [r.accepted for r in learning]
                try:
                    with self._asking:
                        table.observe([row.seq for row in learning], drafted, accepted)
                except Exception as error:
                    self._met([row.seq for row in learning], error)

    def _learning(self, name: str, rows: list[PlanRow]) -> list[PlanRow]:
        """Those whose drafts this table governs now, and that learn. One without a slot was not asked."""
        mine = [row for row in rows if row.decodes and row.seq.slot >= 0 and self._trusted(row.seq)]
        return [
            row
            for row in mine
            if self._maker(row.seq.drafter) == name and self.tables[row.seq.drafter].learns(row.seq)
        ]
