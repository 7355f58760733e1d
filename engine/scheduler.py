"""Which rows run in the next step, and with how many tokens.

There are no prefill and decode phases: every row's KV chases its tokens. Rows that lack only the
newest token's KV decode (and may draft), the others take chunks under the token budget. Blocks run
out: the last row, of the tenant with the most, gives its own back and is recomputed later.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from engine.kv.blocks import BlockManager
from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft
from engine.types import FinishReason, TokenLogprob
from engine.waiting import Waiting, in_turn

MIN_CHUNK = 16  # tokens of prefill that a step makes however many rows decode


@dataclass
class PlanRow:
    """One row of a step, filled along the way: by scheduler, drafter, target, verifier and commit."""

    seq: Sequence
    tokens: int  # pending tokens of the row that run now
    sl: int = 0  # draft tokens that may follow them, if the row decodes
    sl_reason: str | None = None  # what bounds sl: policy, cap, room
    decodes: bool = False  # only the newest token was pending when the row was planned: it may draft
    samples: bool = field(init=False)  # this pass reaches the newest token: the next one can be sampled

    draft: RowDraft = field(default_factory=RowDraft)
    logits: Tensor | None = (
        None  # the target's [k, V] of this row; the last len(draft) + 1 are the verifier's
    )
    path: Seq[int] = ()  # the nodes of the draft that stand
    next_token: int = -1
    settled: bool = False  # the KV of its path has been moved to where it belongs
    failed: bool = False  # NaN or infinite logits
    lost: str | None = None  # why it failed, if not for its logits

    new: list[int] = field(default_factory=list)  # tokens that the request gets
    first: bool = False  # among them its first
    finish: FinishReason | None = None
    stop_token: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def accepted(self) -> int:
        """Draft tokens that stand."""
        return len(self.path)

    def __post_init__(self) -> None:
        assert self.tokens > 0, "a running row always has a pending token"
        self.samples = self.tokens == self.seq.pending


Limits = Callable[[list[Sequence]], list[tuple[int, str | None]]]


class Scheduler:
    """Owns the waiting and running sequences and their blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        token_budget: int,
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        self._on_preempt = on_preempt
        self._blocks, self._max_num_seqs, self._budget = blocks, max_num_seqs, token_budget
        self.waiting = Waiting()
        self.running: list[Sequence] = []  # sorted by rank
        self.preemptions = 0
        self._stuck: Sequence | None = None  # the last row that did not fit, and the free blocks then
        self._stuck_at = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished or aborted sequence out and frees its blocks."""
        if seq.status == "running":
            self.running.remove(seq)
            self.waiting.count((seq,))
        else:
            self.waiting.remove(seq)
        seq.status = "finished"
        self._release(seq)

    def plan(self, limits: Limits) -> list[PlanRow]:
        """The rows of the next step, with blocks for all their tokens. `limits` says what may be drafted."""
        decoding = [seq for seq in self.running if seq.decodes]
        rows: list[PlanRow] = []
        wishes = self._fitted(limits(decoding)) if decoding else []
        for seq, (sl, reason) in zip(decoding, wishes, strict=True):
            if seq.status == "running":
                self._place(rows, PlanRow(seq, 1, sl, reason, decodes=True))
        # A tree may have many times the nodes that it will have: it is charged as a chain would be.
        charged = sum(row.tokens + min(row.sl, row.seq.max_sl) for row in rows)
        budget = max(self._budget - charged, MIN_CHUNK)
        for seq in in_turn(seq for seq in self.running if not seq.decodes):
            if seq.status == "running" and budget > 0:
                take = min(seq.pending, budget)
                if self._place(rows, PlanRow(seq, take)):
                    budget -= take
        self._admit(rows, budget)
        return rows

    def _fitted(self, wishes: list[tuple[int, str | None]]) -> list[tuple[int, str | None]]:
        """Drafts cut to what a pass may have, the longest of them."""
        left, most = max(self._budget - len(wishes), 0), 0
        for place, (sl, _) in enumerate(sorted(wishes, key=lambda wish: wish[0])):
            most = min(sl, left // (len(wishes) - place))
            if most < sl:
                break
            left -= sl
        return [(most, "room") if sl > most else (sl, reason) for sl, reason in wishes]

    def _admit(self, rows: list[PlanRow], budget: int) -> None:
        if self.waiting:
            self.waiting.count(self.running)
        while self.waiting and len(self.running) < self._max_num_seqs and budget > 0:
            seq = self.waiting.next()
            if seq is self._stuck and self.running and self._blocks.free_blocks <= self._stuck_at:
                return  # it would not fit now either: not looked up again in every step
            free = self._blocks.free_blocks
            self._match(seq)
            # All of the prompt's blocks now, so that a prefill is not preempted half-way for want of them.
            if seq.table is None or not self._blocks.extend(seq.table, len(seq.tokens) + 1):
                self._release(seq)
                self._stuck, self._stuck_at = seq, free
                return
            self.waiting.take(seq)
            seq.status = "running"
            insort(self.running, seq, key=lambda s: s.rank)
            take = min(seq.pending, budget)
            rows.append(PlanRow(seq, take))
            budget -= take

    def _match(self, seq: Sequence) -> None:
        """Takes what the prefix cache has; at least one token stays pending, since it gives the logits."""
        cacheable = 0 if seq.params.prompt_logprobs is not None else len(seq.tokens) - 1
        seq.table = self._blocks.match(seq.tokens, seq.request.cache_salt, cacheable)
        seq.kv_len = seq.table.committed
        seq.draft_kv_len = seq.table.draft_tokens
        if not seq.started:
            seq.cached_tokens = seq.kv_len

    def _place(self, rows: list[PlanRow], row: PlanRow) -> bool:
        """Finds blocks for the row: drafts less, else preempts from the end, at last the row itself."""
        seq = row.seq
        assert seq.table is not None
        while True:
            if self._blocks.extend(seq.table, seq.kv_len + row.tokens + row.sl):
                rows.append(row)
                return True
            if row.sl:
                row.sl, row.sl_reason = 0, "room"
                continue
            victim = in_turn(self.running)[-1]
            self._preempt(victim)
            rows[:] = [placed for placed in rows if placed.seq is not victim]
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        self._on_preempt(seq)
        seq.status = "waiting"
        self.add(seq)
        self.preemptions += 1

    def _release(self, seq: Sequence) -> None:
        if seq.table is not None:
            self._blocks.release(seq.table)
            seq.table = None
        seq.kv_len = seq.draft_kv_len = 0
