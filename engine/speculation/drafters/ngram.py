"""The n-gram drafter (prompt lookup decoding): copies what followed the same suffix before.

No model and no KV; q is one-hot. Its signals are the shares of what followed the longest match:
`prob` is the share of the proposed token.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence as Seq

import torch

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable, powers_of_two
from engine.speculation.drafters.base import Drafted, Drafts, RowDraft
from engine.speculation.features import TOP
from engine.speculation.ngrams import NgramIndex
from engine.speculation.policy import Signals, options_of
from engine.types import GenerateRequest, SamplingParams


class NgramDrafter:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self, seq: Sequence) -> int:
        return 1 << 30

    def lags(self, seq: Sequence) -> bool:
        return False  # it has no KV; draft() keeps the index up

    def read(self, rows: Seq[tuple[Sequence, int]], budget: int) -> None:
        return None

    def warm(self, table: PolicyTable, policy: str, rows: int) -> None:
        """Asks the policy on a GPU, if it can govern this drafter, for every number of rows that compiles."""
        if self._device.type != "cuda" or not table.serves(policy):
            return
        request = GenerateRequest(id="", prompt_ids=(1, 2, 1, 2, 1), params=SamplingParams())
        for size in powers_of_two(min(rows, 64)):
            options = options_of(policy, {})
            seqs = [Sequence(request, 0, True, "ngram", policy, options, 2) for _ in range(size)]
            for seq in seqs:
                table.take(seq)
            self.draft(seqs, [2] * size, table)
            for seq in seqs:
                table.give_back(seq)

    def begin(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> Drafts:
        begin = time.perf_counter()
        drafts = self.draft(rows, limits, table)
        seconds, steps = time.perf_counter() - begin, max(len(draft.tokens) for draft in drafts)
        drafted = Drafted(drafts, [(len(rows), seconds / steps)] if steps else [])
        return lambda: drafted

    def draft(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> list[RowDraft]:
        for row in rows:
            if row.ngrams is None:
                row.ngrams = NgramIndex(row.tokens)
            row.ngrams.update()
        drafts = [RowDraft() for _ in rows]
        joint = [1.0] * len(rows)
        needs = table.needs(rows)
        alive = list(range(len(rows)))
        step = 0
        while alive:
            step += 1
            found: dict[int, Counter[int]] = {}
            for i in alive:
                guess = rows[i].ngrams.next(drafts[i].tokens)  # type: ignore[union-attr]
                masks = rows[i].constraint
                if guess is None or (
                    masks is not None and not masks.permits(rows[i], drafts[i].tokens, guess[0])
                ):
                    drafts[i].stop_reason = "drafter"
                    continue
                drafts[i].tokens.append(guess[0])
                found[i] = guess[1]
                joint[i] *= guess[1][guess[0]] / guess[1].total()
            alive = list(found)
            if needs and alive:
                signals = self._signals(step, rows, drafts, found, joint)
                keep = table.keep_drafting([rows[i] for i in alive], signals)
                for i, more in zip(alive, keep, strict=True):
                    if not more:
                        drafts[i].stop_reason = "policy"
            alive = [i for i in alive if drafts[i].stop_reason is None and step < limits[i]]
        return drafts

    def _signals(
        self,
        step: int,
        rows: Seq[Sequence],
        drafts: list[RowDraft],
        found: dict[int, Counter[int]],
        joint: list[float],
    ) -> Signals:
        shares = {i: [n / counts.total() for _, n in counts.most_common()] for i, counts in found.items()}

        def floats(values: list[float] | list[list[float]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device)

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        return Signals(
            step=torch.full((), step, device=self._device),
            token=ints([drafts[i].tokens[-1] for i in found]),
            position=ints([rows[i].generated + step - 1 for i in found]),
            alive=torch.ones(len(found), dtype=torch.bool, device=self._device),
            prob=floats([counts[drafts[i].tokens[-1]] / counts.total() for i, counts in found.items()]),
            largest=floats([s[0] for s in shares.values()]),
            top=floats([(s[:TOP] + [0.0] * TOP)[:TOP] for s in shares.values()]),
            entropy=floats([-sum(p * math.log(p) for p in s) for s in shares.values()]),
            joint=floats([joint[i] for i in found]),
        )
