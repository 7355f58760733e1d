"""The model drafter: a smaller model proposes a chain, token by token, over its own paged KV.

It shares block ids with the target. `Sequence.draft_kv_len` says how much of its KV is there: it
lags one token behind after a full acceptance and any number after SL=0, and reads those first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from engine.kv.blocks import BlockManager
from engine.models.runner import Batch, Chunk, Runner
from engine.sampling import Place, scaled_logits
from engine.sequence import Sequence
from engine.speculation.control import PolicyTable, powers_of_two
from engine.speculation.drafters.base import Drafted, Drafts, RowDraft
from engine.speculation.faults import fatal
from engine.speculation.features import signals
from engine.speculation.noise import GumbelNoise, RandomSource
from engine.speculation.policy import Need, Signals

if TYPE_CHECKING:
    from engine.speculation.drafters.loop import DraftLoop
    from engine.speculation.drafters.tree_lane import TreeLane

SMALL_LAG = 16  # tokens that the first draft step feeds along; more is read first, in chunks


class ModelDrafter:
    """`vocab`: ids at or above it are padding and never proposed. `max_sl`: the most to draft for a row."""

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        vocab: int,
        eos_ids: Seq[int],
        noise: GumbelNoise,
        random: RandomSource,
        max_sl: int,
    ) -> None:
        self.runner, self._blocks, self._vocab, self.eos_ids = runner, blocks, vocab, eos_ids
        self.noise, self.random, self._max_sl = noise, random, max_sl
        self.loops = runner.device.type == "cuda" and hasattr(runner, "decode")
        self._loop: DraftLoop | None = None
        self._tree_lane: TreeLane | None = None
        # Whether rows with masks draft under them, step by step; the device's loop knows none.
        self.mask_drafts = not self.loops

    def room(self, seq: Sequence) -> int:
        return max(0, self.runner.context - len(seq.tokens) + 1)

    def lags(self, seq: Sequence) -> bool:
        return len(seq.tokens) - seq.draft_kv_len > SMALL_LAG

    def read(self, rows: Seq[tuple[Sequence, int]], budget: int) -> None:
        chunks = []
        for row, count in rows:
            take = min(count - row.draft_kv_len, budget)
            if take > 0 and len(row.tokens) <= self.runner.context:
                start = row.draft_kv_len
                row.draft_kv_len += take
                chunks.append(Chunk(row.tokens[start : row.draft_kv_len], start, row.blocks, 0))
                budget -= take
        if chunks:
            self.forward(chunks)

    def begin(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> Drafts:
        loop = self._device_loop(table)
        masked = [i for i, row in enumerate(rows) if self.mask_drafts and row.constraint is not None]
        free = [i for i in range(len(rows)) if i not in set(masked)]
        # What filters cut is drafted all the same: q is free, and a step of the loop costs half as much.
        if loop is None or not free or not loop.takes([rows[i] for i in free]):
            drafted = self.draft(rows, limits, table)
            return lambda: drafted
        if not masked:
            return loop.begin(rows, limits)
        own = self.draft([rows[i] for i in masked], [limits[i] for i in masked], table)
        wait = loop.begin([rows[i] for i in free], [limits[i] for i in free])
        return lambda: _merged(masked, own, free, wait())

    def warm(self, table: PolicyTable, policy: str, rows: int) -> None:
        """Compiles and captures on a GPU what drafting for up to `rows` rows under the policy needs."""
        self.runner.warm(rows, SMALL_LAG)
        loop = self._device_loop(table)
        if loop is not None:
            for size in powers_of_two(min(rows, 64)):
                loop.warm([policy], size)

    def _device_loop(self, table: PolicyTable) -> DraftLoop | None:
        """None where the runner has no kernels: the host drafts step by step."""
        if self._loop is None and self.loops:
            from engine.speculation.drafters.loop import DraftLoop  # imports triton

            blocks = -(-self.runner.context // self._blocks.block_size) + 2
            self._loop = DraftLoop(cast(Any, self.runner), self._vocab, table, blocks, self._max_sl)
        return self._loop

    def tree_lane(self) -> TreeLane | None:
        """What runs short passes of trees in one go; None where the runner has no kernel for them."""
        if self._tree_lane is None and getattr(self.runner, "kernel", None) is not None:
            from engine.speculation.drafters.tree_lane import TreeLane  # imports triton

            self._tree_lane = TreeLane(cast(Any, self.runner), self._vocab)
        return self._tree_lane

    def draft(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> Drafted:
        """Step by step. A fault ends it; what was sampled stays, since to drop it would bias the output.

        Raises what is fatal to the target too.
        """
        drafted = Drafted([RowDraft() for _ in rows])
        read = [row.draft_kv_len for row in rows]
        try:
            self._draft(rows, limits, table, drafted)
        except Exception as error:
            if fatal(error):
                raise
            drafted.fault = error
            for row, length, draft in zip(rows, read, drafted.rows, strict=True):
                row.draft_kv_len = length
                draft.stop_reason = draft.stop_reason or "drafter"
                del draft.laws[len(draft.tokens) :]
        return drafted

    def _draft(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable, drafted: Drafted) -> None:
        drafts, steps = drafted.rows, drafted.steps
        needs = table.needs(rows)
        joint = torch.ones(len(rows), dtype=torch.float32, device=self.runner.device)
        alive = list(range(len(rows)))
        step = 0
        while alive:
            step += 1
            drafting, begin = len(alive), time.perf_counter()
            logits = self.forward([self._chunk(rows[i], drafts[i]) for i in alive])
            tokens, able = self._choose(logits, [rows[i] for i in alive], [drafts[i] for i in alive])
            if not all(able):
                for i in (i for i, can in zip(alive, able, strict=True) if not can):
                    drafts[i].stop_reason = "drafter"
                alive = [i for i in alive if drafts[i].stop_reason is None]
                logits, tokens = logits[able], tokens[able]
            if needs and alive:
                at = torch.tensor(alive, device=joint.device)
                found = self._signals(step, logits, tokens, [rows[i] for i in alive], joint, at, needs)
                if "hidden" in needs:
                    assert self.runner.hidden is not None
                    found.hidden = self.runner.hidden[able].float()
                keep = table.keep_drafting([rows[i] for i in alive], found)
                for i, more in zip(alive, keep, strict=True):
                    if not more:
                        drafts[i].stop_reason = "policy"
            alive = [i for i in alive if drafts[i].stop_reason is None and step < limits[i]]
            if step > 1:  # the first one reads what the draft lacks, too
                steps.append((drafting, time.perf_counter() - begin))

    @property
    def block_size(self) -> int:
        return self._blocks.block_size

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits [M, vocab] of the draft's pass over the chunks."""
        batch = Batch.pack(chunks, self._blocks.block_size)
        return self.runner.forward(batch)[:, : self._vocab]

    def _chunk(self, row: Sequence, draft: RowDraft) -> Chunk:
        """What the draft must see next: the newest token, and before it what its KV lacks."""
        tokens = draft.tokens[-1:] or row.tokens[row.draft_kv_len :]
        start = row.draft_kv_len
        row.draft_kv_len = start + len(tokens)
        return Chunk(tokens, start, row.blocks)

    def _choose(
        self, logits: Tensor, rows: list[Sequence], drafts: list[RowDraft]
    ) -> tuple[Tensor, list[bool]]:
        """Appends the next token to every draft that can have one; int64[B], and which can.

        A draft cannot where its law is none: a head over a reduced vocabulary of which the request
        forbids every token, or NaN. Keeps q where rejection sampling needs it.
        """
        places = [Place(r, d.tokens) for r, d in zip(rows, drafts, strict=True)]
        scaled = scaled_logits(logits, places, self.eos_ids, drafting=True, masks=self.mask_drafts)
        noisy = [i for i, row in enumerate(rows) if row.coupled and row.params.temperature > 0]
        if noisy:
            positions = [len(rows[i].tokens) + len(drafts[i].tokens) for i in noisy]
            noise = self.noise([rows[i].seed for i in noisy], positions)
            scaled = scaled.to(torch.float64)
            scaled[noisy] += noise
        best, tokens = scaled.max(-1)
        able: list[bool] = best.isfinite().tolist()
        if not all(able):
            for draft, nan in zip(drafts, logits.isnan().any(-1).tolist(), strict=True):
                draft.unsound = nan
        sampled = [i for i, row in enumerate(rows) if able[i] and not row.coupled]
        if sampled:
            laws = scaled[sampled].softmax(-1)
            tokens[sampled] = self.random.categorical(laws, [rows[i] for i in sampled])
            for i, law in zip(sampled, laws, strict=True):
                drafts[i].laws.append(law)
        for draft, token, can in zip(drafts, tokens.tolist(), able, strict=True):
            if can:
                draft.tokens.append(token)
        return tokens, able

    def _signals(
        self,
        step: int,
        logits: Tensor,
        tokens: Tensor,
        rows: list[Sequence],
        joint: Tensor,
        at: Tensor,
        needs: frozenset[Need],
    ) -> Signals:
        found = signals(logits, tokens, needs)
        if "prob" in found:
            joint[at] *= found["prob"]
        position = [row.generated + step - 1 for row in rows]
        return Signals(
            step=torch.full((), step, device=tokens.device),
            token=tokens,
            position=torch.tensor(position, device=tokens.device),
            alive=torch.ones_like(tokens, dtype=torch.bool),
            prob=found.get("prob"),
            largest=found.get("largest"),
            top=found.get("top"),
            entropy=found.get("entropy"),
            joint=joint[at],
        )


def _merged(some: list[int], first: Drafted, others: list[int], second: Drafted) -> Drafted:
    """The drafts in the order of their rows."""
    drafts = dict(zip([*some, *others], [*first.rows, *second.rows], strict=True))
    steps = [*first.steps, *second.steps]
    return Drafted([drafts[i] for i in range(len(drafts))], steps, first.fault or second.fault)
