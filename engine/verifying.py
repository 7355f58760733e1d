"""After the target's pass: which tokens of the rows stand, and where the KV of trees' ways goes."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.drafting import Drafting
from engine.flight import Flight
from engine.governing import Governing
from engine.models.runner import Batch, Chunk
from engine.parts import Parts
from engine.passes import moves_of, tail
from engine.scheduler import PlanRow
from engine.speculation.drafters.base import Verdict


class Verifying:
    """Asks the verifier, and tells drafters and policies."""

    def __init__(self, parts: Parts, drafting: Drafting, governing: Governing) -> None:
        self._parts, self._drafting, self._governing = parts, drafting, governing

    def verify(self, rows: list[PlanRow], flight: Flight) -> None:
        """Verdicts for the rows that sample; the others are only checked for NaN."""
        assert flight.logits is not None
        sampling = [row for row in rows if row.samples]
        if len(sampling) < len(rows):
            for row in rows:
                row.failed = not row.samples and bool(tail(row, 1).isnan().any())
        if not sampling:
            return
        if flight.verdict is not None:  # also of rows that were aborted meanwhile
            _tell(flight.passed, flight.verdict())
        else:
            _tell(sampling, self._verdict(sampling, flight.logits))
        if lost := [row for row in sampling if row.failed and row.draft.tokens]:
            self._ask_again(rows, lost)
        self._settle([row for row in sampling if row.draft.tokens and not row.failed])
        if not flight.taught:
            self._governing.teach(sampling)

    def _ask_again(self, rows: list[PlanRow], lost: list[PlanRow]) -> None:
        """What the target says behind a draft token that falls is to harm nobody, and a NaN there reaches the
        positions before it, too: masked, it counts 0 times, which is NaN. So these are asked one by one.

        No draft is dropped for it: that would bias what rejection sampling gives.
        """
        for row in rows:
            assert row.logits is not None
            row.logits = row.logits.clone()  # valid until the next pass
        ways = [row.draft.before() for row in lost]
        for row, way in zip(lost, ways, strict=True):
            row.logits = tail(row, len(way)).fill_(float("nan"))
        for k in range(max(map(len, ways))):
            asked = [(row, way[k]) for row, way in zip(lost, ways, strict=True) if _reachable(row, k)]
            for (row, _), law in zip(asked, self._pass(asked) if asked else (), strict=True):
                tail(row, len(row.draft.tokens) + 1)[k] = law
        seqs, drafts = [row.seq for row in lost], [row.draft for row in lost]
        logits = torch.cat([tail(row, len(way)) for row, way in zip(lost, ways, strict=True)])
        _tell(lost, self._parts.verifier.verify_reached(seqs, drafts, logits))
        for row in lost:
            row.settled = True
        if stood := [(row, [row.draft.tokens[k] for k in row.path]) for row in lost if not row.failed]:
            self._pass(stood)  # for its KV: what was asked last may have spoilt it

    def _pass(self, asked: list[tuple[PlanRow, list[int]]]) -> Tensor:
        """Logits [B, V] behind these tokens of each row, which follow its newest one."""
        chunks = [
            Chunk([*row.seq.tokens[row.seq.kv_len :][: row.tokens], *way], row.seq.kv_len, row.seq.blocks)
            for row, way in asked
        ]
        batch = Batch.pack(chunks, self._parts.blocks.block_size)
        return self._parts.target.forward(batch)[:, : self._parts.info.vocab_size]

    def _settle(self, rows: list[PlanRow]) -> None:
        """Moves the KV of trees' accepted ways to where the next tokens' belongs: slot is position again."""
        unsettled = [row for row in rows if not row.settled]
        for row in unsettled:
            row.settled = True
        if moves := moves_of(unsettled, self._parts.blocks.block_size):
            self._parts.target.move(moves)
        self._drafting.settle(rows)

    def _verdict(self, sampling: list[PlanRow], logits: Tensor) -> Verdict:
        tails = [tail(row, len(row.draft.tokens) + 1) for row in sampling]
        if sum(map(len, tails)) < len(logits):
            logits = torch.cat(tails)
        seqs, drafts = [row.seq for row in sampling], [row.draft for row in sampling]
        return self._parts.verifier.verify(seqs, drafts, logits)


def _tell(rows: list[PlanRow], verdict: Verdict) -> None:
    for i, row in enumerate(rows):
        row.path, row.next_token, row.failed = verdict.path[i], verdict.next_token[i], verdict.failed[i]


def _reachable(row: PlanRow, k: int) -> bool:
    """Whether the row has a place k, and a law at the place before it."""
    if k == 0 or k > len(row.draft.tokens):
        return k == 0
    before = k - 1 if row.draft.parents is None else row.draft.parents[k - 1] + 1
    return bool(tail(row, len(row.draft.tokens) + 1)[before].amax().isfinite())
