"""Who governs the rows' drafts: what each row may draft, and what its policy, or its tree's rule, is taught.

Here faults of policies end: nothing is raised but what is fatal to the target, too. Where there is no memory
to ask them, rows run without a draft.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from engine.config import EngineConfig
from engine.memory_faults import Shortage, is_out_of_memory
from engine.parts import Parts
from engine.pricing import mix
from engine.scheduler import PlanRow
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.costs import EngineCosts
from engine.speculation.faults import Faults, PolicyFault
from engine.speculation.policy import options_of
from engine.speculation.soundness import wishes_said
from engine.speculation.stopwatch import Stopwatch
from engine.speculation.tree import TreeOptions, rules, tree_options
from engine.speculation.tree_table import TreeTable
from engine.types import SpeculationParams

T = TypeVar("T")

_LOOK = 10.0  # seconds between looks at what policies have learned


class Governing:
    """Every drafter's table. `costs` are the engine's, kept current by it; `faults`: of drafters, too."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self._parts = parts
        self.tables: dict[str, PolicyTable | TreeTable] = {
            name: PolicyTable(config.max_num_seqs, parts.target.device, equipment)
            for name, equipment in parts.equipment.items()
        }
        self.tables |= {name: each.table() for name, each in rules().items() if name in parts.drafters}
        for table in self.tables.values():
            if isinstance(table, TreeTable):
                table.join(self.chains)
        self.costs = EngineCosts()
        self._lately = dict.fromkeys(parts.drafters, True)  # whether any row drafted
        self._asking = Stopwatch()  # for limits, and teaching
        self.faults = Faults()
        self._shortage = Shortage()
        self._looked = time.monotonic()

    @property
    def chains(self) -> PolicyTable:
        """What governs the draft model's chains; KeyError without a draft model."""
        table = self.tables["model"]
        assert isinstance(table, PolicyTable)
        return table

    def maker(self, name: str) -> str:
        """Who drafts now for the rows of this drafter: those of trees may get chains."""
        table = self.tables[name]
        return "model" if isinstance(table, TreeTable) and table.chained else name

    def governed(self, drafter: str, asked: SpeculationParams) -> tuple[str, object]:
        """Who stops drafts, with its options. Raises InvalidRequest."""
        info = self._parts.info
        if drafter in rules():
            default = info.default_options if drafter == info.default_drafter else {}
            return rules()[drafter].chains, tree_options(
                drafter, default if asked.options is None else asked.options
            )
        policy = asked.policy or info.default_policy
        chains = info.default_drafter not in rules()
        default = info.default_options if chains and policy == info.default_policy else {}
        options = options_of(policy, default if asked.options is None else asked.options)
        if asked.options is not None:
            self.check(drafter, policy, options)
        return policy, options

    def check(self, drafter: str, policy: str, options: object) -> None:
        """Raises InvalidRequest for options that the policy cannot compute with."""
        if drafter in self.tables and not self.faults.off(drafter, policy):
            try:
                self.tables[drafter].check(policy, options)
            except PolicyFault as fault:
                self.faults.met(drafter, fault)
            except Exception as error:
                self._short(error, "where options are checked: they go unchecked")

    def give_back(self, seq: Sequence) -> None:
        """The row has ended."""
        if seq.drafter in self.tables:
            try:
                self.tables[seq.drafter].give_back(seq)
            except Exception as error:
                self._forgone(seq, error, "where a row ends: its policy is not told")
                seq.slot = -1

    def put_aside(self, seq: Sequence) -> None:
        """The row was preempted. What cannot be put aside is forgotten."""
        if seq.drafter in self.tables:
            try:
                self.tables[seq.drafter].put_aside(seq)
            except Exception as error:
                self._forgone(seq, error, "where a policy's state is put aside: it is forgotten")
                self.give_back(seq)

    def seconds_asked(self) -> float:
        """Host seconds that asking and teaching policies took since the last call."""
        return self._asking.lap() + sum(table.asked_while_drafting.lap() for table in self.tables.values())

    def limits(self, decoding: list[Sequence]) -> list[tuple[int, str | None]]:
        """What each decoding row may draft: the policy's wish, within caps and the room that is left."""
        try:
            with self._asking:
                self._look()
                wishes = self._wishes(decoding)
            return [
                self._bounded(seq, wishes[seq.id])
                if seq.id in wishes and self.trusted(seq)
                else (0, self._why(seq))
                for seq in decoding
            ]
        except Exception as error:
            self._short(error, f"where it is asked how much {len(decoding)} rows draft: now they do not")
            return [(0, "room" if seq.drafter in self.tables else None) for seq in decoding]

    def _forgone(self, seq: Sequence, error: Exception, what: str) -> None:
        """A table raised where its answer does not matter."""
        if is_out_of_memory(error):
            self._shortage.tell(what)
        else:
            self.met([seq], error)

    def _short(self, error: Exception, what: str) -> None:
        """It goes on without this memory. Raises what is anything else."""
        if not is_out_of_memory(error):
            raise error
        self._shortage.tell(what)

    def _wishes(self, decoding: list[Sequence]) -> dict[str, int]:
        wishes: dict[str, int] = {}
        for name, table in self.in_turn(self.tables).items():
            while mine := [seq for seq in decoding if self.trusted(seq) and self._asks(seq, name)]:
                try:
                    for each in self._weighed(name):
                        load = self.tables[each].load
                        load.refresh(self.costs.drafts[each], self.costs.verify, len(decoding), mix(decoding))
                    for seq in mine:
                        if seq.slot < 0:
                            self.tables[seq.drafter].take(seq)
                    asked = wishes_said(table.limits(mine), len(mine))
                except Exception as error:
                    self.met(mine, error)
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

    @staticmethod
    def _weighed(name: str) -> tuple[str, ...]:
        """Whose prices the table is to know: its drafter's, and those of chains if it may give them."""
        rule = rules().get(name)
        return (name,) if rule is None or rule.chains == "none" else (name, "model")

    def _asks(self, seq: Sequence, name: str) -> bool:
        """Whether this table is to be asked what the row may draft: its drafter's, then its chains'."""
        return seq.drafter in self.tables and name in (seq.drafter, self.maker(seq.drafter))

    @staticmethod
    def in_turn(by_name: Mapping[str, T]) -> dict[str, T]:
        """The draft model's chains come last: trees' rows may join them, and nobody else may use the draft
        while its loop runs."""
        return dict(sorted(by_name.items(), key=lambda each: each[0] == "model"))

    def met(self, seqs: list[Sequence], error: Exception) -> None:
        """Notes a fault of those who drafted, or decided, for these rows."""
        to_blame = [seq for seq in seqs if not isinstance(error, PolicyFault) or error.policy == seq.policy]
        for drafter in sorted({seq.drafter for seq in to_blame or seqs}):
            self.faults.met(drafter, error)

    def trusted(self, seq: Sequence) -> bool:
        return not (seq.mistrusted or self.faults.off(seq.drafter, seq.policy))

    def _why(self, seq: Sequence) -> str | None:
        """Why a row that was not asked does not draft: it has no drafter, or a fault was met."""
        return "drafter" if seq.drafter in self.tables else None

    def _look(self) -> None:
        """Now and then: a policy that has learned NaN would stop drafting for good, and say nothing."""
        if time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            for name, table in self.tables.items():
                for policy in self._healed(name, table):
                    self.faults.met(name, PolicyFault(policy, "what it has learned is not finite: forgotten"))

    def _healed(self, name: str, table: PolicyTable | TreeTable) -> list[str]:
        try:
            return table.heal()
        except Exception as error:
            self.faults.met(name, error)
            return []

    def _bounded(self, seq: Sequence, wish: int) -> tuple[int, str | None]:
        # A draft of k emits up to k + 1 tokens and writes KV for the newest token and all k.
        left = self._parts.info.max_model_len - len(seq.tokens) - 1
        try:
            own = operator.index(self._parts.drafters[seq.drafter].room(seq))
        except Exception as error:
            self.met([seq], error)
            return 0, "drafter"
        room = min(seq.params.max_tokens - seq.generated - 1, left, own)
        if self.maker(seq.drafter) in rules() and min(seq.max_sl, room) > 0:  # they bound the tree's depth
            assert isinstance(seq.options, TreeOptions)
            bounds = (wish, "policy"), (seq.options.budget, "cap"), (max(left, 0), "room")
            return min(bounds, key=lambda bound: bound[0])
        return min((wish, "policy"), (seq.max_sl, "cap"), (max(room, 0), "room"), key=lambda bound: bound[0])

    def drafts(self, seq: Sequence) -> bool:
        """Whether its policy lets it draft; one that learns, if it let any row lately."""
        table = self.tables[seq.drafter]
        if not self.trusted(seq):
            return False
        try:
            if table.learns(seq):
                return self._lately[seq.drafter]
            with self._asking:
                if seq.slot < 0:
                    table.take(seq)
                return wishes_said(table.limits([seq]), 1) != [0]
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
            self.met([row.seq for row in rows], error)
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
                    self.met([row.seq for row in learning], error)

    def _learning(self, name: str, rows: list[PlanRow]) -> list[PlanRow]:
        """Those whose drafts this table governs now, and that learn. One without a slot was not asked."""
        mine = [row for row in rows if row.decodes and row.seq.slot >= 0]
        return [row for row in mine if self.maker(row.seq.drafter) == name and self._learns(row.seq)]

    def _learns(self, seq: Sequence) -> bool:
        try:
            return self.trusted(seq) and self.tables[seq.drafter].learns(seq)
        except Exception as error:
            self.met([seq], error)
            return False
