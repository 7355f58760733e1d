"""Target passes of at most 16 tokens with their verdict, on a GPU: one graph replay, one wait.

For rows whose next token is the target's own choice (coupled, without penalties, filters, masks). The answer
stays on the device too, where policies can be told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.models.decode_data import META, MOST
from engine.models.fused import FusedRunner
from engine.models.kernels.agree import agree
from engine.models.kernels.choose import Chooser
from engine.sampling import plain
from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft, Verdict, agreed
from engine.speculation.noise import coupled_state
from engine.speculation.pass_lane import LaneRow, PassLane


class TargetLane(PassLane):
    """`answer` int32[4, 16], by row: draft tokens of a chain that stand, the next token, whether the logits
    were sound; by token the target's choice behind it, -1 where there is none."""

    def __init__(self, runner: FusedRunner, vocab: int) -> None:
        super().__init__(runner, vocab, torch.zeros(4, MOST, dtype=torch.int32, device=runner.device))
        self._places = torch.arange(MOST, dtype=torch.int32, device=runner.device)
        self._choosers: dict[int, Chooser] = {}

    def takes(self, rows: Seq[Sequence], drafts: Seq[RowDraft]) -> bool:
        """Whether it can: all rows lack but their newest token, and are plain."""
        tokens = len(rows) + sum(len(draft.tokens) for draft in drafts)
        return tokens <= self._runner.decodes and all(
            row.coupled and plain(row) and not draft.laws for row, draft in zip(rows, drafts, strict=True)
        )

    def begin(self, rows: Seq[Sequence], drafts: Seq[RowDraft]) -> tuple[Tensor, Callable[[], Verdict]]:
        """Queues the pass over every row's newest and draft tokens.

        Returns logits float[tokens, vocab], valid until the next pass, and what waits for the verdict.
        """
        told = []
        for row, draft in zip(rows, drafts, strict=True):
            start, heat = len(row.tokens) - 1, row.params.temperature
            tokens = [row.tokens[-1], *draft.tokens]
            keys = [len(row.tokens) + depth for depth in draft.depths()]
            state = coupled_state(row.seed) if heat > 0 else 0
            told.append(LaneRow(row, start, tokens, draft.branches(start), state, keys, heat))
        return self._begin(told), lambda: self._verdict(drafts)

    def _follow(self, logits: Tensor, size: int, noisy: bool) -> None:
        if size not in self._choosers:
            self._choosers[size] = Chooser(size, self._vocab, self._runner.device)
        states, keys, heat = self._states[:size], self._keys[:size], self._heat[:size]
        choice = self._choosers[size](logits, self._places[:size], states, keys, heat)
        agree(self._words[:META], choice.token, choice.fine, self.answer)

    def _verdict(self, drafts: Seq[RowDraft]) -> Verdict:
        accepted, next_token, sound, chosen = self._wait().tolist()
        verdict = Verdict.of(len(drafts))
        at = 0
        for i, draft in enumerate(drafts):
            end = at + len(draft.tokens) + 1
            if draft.parents is None:
                verdict.path[i], verdict.next_token[i] = range(accepted[i]), next_token[i]
            else:
                verdict.path[i], verdict.next_token[i] = agreed(draft, chosen[at:end])
            verdict.failed[i], at = not sound[i], end
        return verdict
