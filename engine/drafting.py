"""Drafting for the engine's rows: whose drafts are begun, what drafters read, what becomes of both.

Here faults of drafters end: nothing is raised but what is fatal to the target, too.
"""

from __future__ import annotations

from engine.config import EngineConfig
from engine.flight import Flight
from engine.governing import Governing
from engine.pairing import chain_options
from engine.parts import Parts
from engine.scheduler import PlanRow
from engine.sequence import Sequence
from engine.speculation.drafters.base import Drafted, Drafter, Drafts, RowDraft
from engine.speculation.drafters.tree import TreeDrafter
from engine.speculation.faults import DraftFault
from engine.speculation.policy import options_of
from engine.speculation.soundness import drafts_said, kv_said
from engine.speculation.tree import rules
from engine.speculation.tree_table import TreeTable


class Drafting:
    """The drafters, each under the table that governs it."""

    def __init__(self, config: EngineConfig, parts: Parts, governing: Governing) -> None:
        self._parts, self._config, self._governing = parts, config, governing

    def warm(self) -> None:
        """Readies the drafters and their tables for the configured policy."""
        policy, rows = self._config.policy, self._config.max_num_seqs
        for name, drafter in self._parts.drafters.items():
            table = self._governing.tables[name]
            table.check(policy, options_of(policy, chain_options(self._config)))
            drafter.warm(table, policy, rows)
            table.warm(policy, rows)
        default = rules().get(self._parts.info.default_drafter)
        if default is not None and default.chains != "none":
            self._parts.drafters["model"].warm(self._governing.chains, default.chains, rows)
            self._governing.chains.warm(default.chains, rows)

    def begin(self, rows: list[PlanRow]) -> list[tuple[str, list[PlanRow], Drafts]]:
        """A draft for every row that may have one; what the drafter has not seen of it is read first."""
        for row in rows:
            row.draft.stop_reason = row.sl_reason
        begun, ready = [], self._ready(rows)
        for maker, drafter in self._governing.in_turn(self._parts.drafters).items():
            chosen = [row for row in ready if self._governing.maker(row.seq.drafter) == maker]
            if chosen:
                seqs, limits = [row.seq for row in chosen], [row.sl for row in chosen]
                read = [seq.draft_kv_len for seq in seqs]
                try:
                    begun.append((maker, chosen, drafter.begin(seqs, limits, self._governing.tables[maker])))
                except Exception as error:
                    self._fell(error, seqs, read)
        return begun

    def _ready(self, rows: list[PlanRow]) -> list[PlanRow]:
        """Those of the rows that may draft, of which all but a little has been read."""
        found = []
        for name, drafter in self._parts.drafters.items():
            mine = [row for row in rows if row.sl > 0 and row.seq.drafter == name]
            try:
                unread = [(row.seq, len(row.seq.tokens) - 1) for row in mine if drafter.lags(row.seq)]
                if unread:
                    self._read(drafter, unread)
                late = [drafter.lags(row.seq) for row in mine]
            except Exception as error:
                self._governing.met([row.seq for row in mine], error)
                continue
            off = self._governing.faults.off(name, "")
            for row, lags in zip(mine, late, strict=True):
                if lags:  # by more than one pass reads: the rest in the next iterations
                    row.draft.stop_reason = "room"
                elif not off:
                    found.append(row)
        return found

    def _read(self, drafter: Drafter, rows: list[tuple[Sequence, int]]) -> None:
        seqs = [seq for seq, _ in rows]
        read = [seq.draft_kv_len for seq in seqs]
        try:
            drafter.read(rows, self._parts.token_budget)
            for seq in seqs:
                if flaw := kv_said(seq, 0):
                    raise DraftFault(f"it told of {flaw}")
        except Exception as error:
            self._fell(error, seqs, read)

    def _fell(self, error: Exception, seqs: list[Sequence], read: list[int]) -> None:
        """Drafting raised: what was read of these rows is what was before."""
        for seq, length in zip(seqs, read, strict=True):
            seq.draft_kv_len = _sure(seq) if kv_said(seq, seq.max_sl) else min(length, seq.draft_kv_len)
        self._governing.met(seqs, error)

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
                self._governing.costs.drafts[maker].observe(count, count, seconds)
        self._check_kv([row for row in flight.rows if row.seq.status == "running"])

    def _check_kv(self, rows: list[PlanRow]) -> None:
        """Before any of it is cached."""
        wrong = {i: flaw for i, row in enumerate(rows) if (flaw := kv_said(row.seq, row.draft.drafted))}
        for i in wrong:
            rows[i].draft, rows[i].seq.draft_kv_len = RowDraft(stop_reason="drafter"), _sure(rows[i].seq)
        if wrong:
            fault = DraftFault(f"it told of {next(iter(wrong.values()))}")
            self._governing.met([rows[i].seq for i in wrong], fault)

    def _drafted(self, rows: list[PlanRow], wait: Drafts) -> Drafted:
        """What came of a draft, after a fault without those rows' trust in it."""
        seqs = [row.seq for row in rows]
        read = [seq.draft_kv_len for seq in seqs]
        deepest, vocab = [seq.max_sl for seq in seqs], self._parts.info.vocab_size
        device = self._parts.target.device
        try:
            drafted, refused = drafts_said(wait(), [row.sl for row in rows], deepest, vocab, device)
        except Exception as error:
            self._fell(error, seqs, read)
            return Drafted([RowDraft(stop_reason="drafter") for _ in rows])
        if drafted.fault is not None:
            self._governing.met(seqs, drafted.fault)
        for i in refused:
            drafted.rows[i] = RowDraft(stop_reason="drafter")
            seqs[i].draft_kv_len = _sure(seqs[i])
        if refused:
            why = f"it gave {len(refused)} of {len(rows)} rows {next(iter(refused.values()))}"
            self._governing.met([seqs[i] for i in refused], DraftFault(why))
        unsound = [seq for seq, draft in zip(seqs, drafted.rows, strict=True) if draft.unsound]
        for seq in unsound:  # its draft KV may hold NaN, which no other request is to find in a cached block
            seq.mistrusted = True
            seq.draft_kv_len = _sure(seq)
        if unsound:
            self._governing.met(
                unsound, DraftFault(f"the draft of {len(unsound)} of {len(rows)} rows gave NaN")
            )
        return drafted

    def settle(self, rows: list[PlanRow]) -> None:
        """Tells tree drafters which ways were accepted, before the rows get their tokens."""
        for row in rows:
            drafter, table = self._parts.drafters[row.seq.drafter], self._governing.tables[row.seq.drafter]
            if isinstance(drafter, TreeDrafter) and isinstance(table, TreeTable):
                try:
                    if row.draft.parents is not None and not row.draft.unsound:
                        drafter.settle(row.seq, row.draft, row.path)
                    table.judged(row.seq, row.draft, row.path)
                    if flaw := kv_said(row.seq, row.draft.drafted):
                        raise DraftFault(f"it told of {flaw}")
                except Exception as error:
                    self._fell(error, [row.seq], [_sure(row.seq)])

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
                if row.seq.max_sl > 0 and row.seq.params.max_tokens > 2 and self._governing.drafts(row.seq)
            ]
            if mine:
                found.append((drafter, [(row.seq, row.seq.kv_len + row.tokens) for row in mine]))
        return found


def _sure(seq: Sequence) -> int:
    """How much of the draft's KV was there before this step, whatever the drafter says."""
    return 0 if seq.table is None else seq.table.draft_tokens
