"""Verification on a GPU of rows without penalties and filters: a few kernels and one read-back.

The same verdicts as `Verifier` gives on the host: coupled rows by `Chooser`, rejecting rows by
`kernels.reject`, which samples by noise keyed by the sequence's draw counter.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.models.kernels.choose import Chooser
from engine.models.kernels.reject import reject
from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft, Verdict, agreed
from engine.speculation.noise import coupled_state, draws_state, uniform
from engine.types import GenerateRequest, SamplingParams


class DeviceVerifier:
    """Buffers for the positions of a pass; they grow with it."""

    def __init__(self) -> None:
        self._chooser: Chooser | None = None
        self._most = 0  # positions it has room for

    def warm(self, logits: Tensor) -> None:
        """Compiles the kernels for logits [>= 2, V] of this kind: coupled, and rejecting with any q."""
        request = GenerateRequest(id="", prompt_ids=(0,), params=SamplingParams(temperature=1.0))
        kept = torch.zeros(1, logits.shape[1], dtype=torch.bfloat16, device=logits.device), 0, 1.0
        for coupled, draft in (
            (True, RowDraft([0])), (False, RowDraft([0])), (False, RowDraft([0], kept=kept))
        ):  # fmt: skip
            row = Sequence(request, 0, coupled, "none", "static", None, 0)
            self.verify([row], [draft], [0], logits)

    def verify(self, rows: Seq[Sequence], drafts: Seq[RowDraft], starts: Seq[int], logits: Tensor) -> Verdict:
        """Row i has those positions of `logits` [M, V] from starts[i] on, one more than it has drafts."""
        verdict = Verdict.of(len(rows))
        coupled = [i for i, row in enumerate(rows) if row.coupled]
        rejecting = [i for i, row in enumerate(rows) if not row.coupled]
        if coupled:
            self._coupled(coupled, rows, drafts, starts, logits, verdict)
        if rejecting:
            _rejecting(rejecting, rows, drafts, starts, logits, verdict)
        return verdict

    def _coupled(
        self,
        chosen: list[int],
        rows: Seq[Sequence],
        drafts: Seq[RowDraft],
        starts: Seq[int],
        logits: Tensor,
        verdict: Verdict,
    ) -> None:
        places: list[int] = []
        states: list[int] = []
        positions: list[int] = []
        heat: list[float] = []
        for i in chosen:
            row, count = rows[i], len(drafts[i].tokens) + 1
            places.extend(range(starts[i], starts[i] + count))
            states.extend([coupled_state(row.seed)] * count)
            positions.extend(len(row.tokens) + depth for depth in drafts[i].depths())
            heat.extend([row.params.temperature] * count)
        if self._chooser is None or self._most < len(places):
            self._most = max(64, 1 << (len(places) - 1).bit_length())
            self._chooser = Chooser(self._most, logits.shape[1], logits.device)
        longs, ints, floats = _sent(logits.device, [states, positions], [places], [heat])
        choice = self._chooser(logits, ints[0], longs[0], longs[1], floats[0])
        count = len(places)
        found = iter(torch.where(choice.fine[:count] != 0, choice.token[:count], -1).tolist())
        for i in chosen:
            mine = [next(found) for _ in range(len(drafts[i].tokens) + 1)]
            verdict.path[i], verdict.next_token[i] = agreed(drafts[i], mine)
            verdict.failed[i] = -1 in mine


def _rejecting(
    chosen: list[int],
    rows: Seq[Sequence],
    drafts: Seq[RowDraft],
    starts: Seq[int],
    logits: Tensor,
    verdict: Verdict,
) -> None:
    places: list[int] = []
    lines: list[int] = []  # of the kept laws, by position
    tokens: list[int] = []
    heat: list[float] = []
    uniforms: list[float] = []
    begins: list[int] = []
    lengths: list[int] = []
    states: list[int] = []
    keys: list[int] = []
    kept: Tensor | None = None
    for i in chosen:
        row, draft = rows[i], drafts[i]
        length, first = len(draft.tokens), -1
        if draft.kept is not None:
            kept, first, _ = draft.kept
        begins.append(len(places))
        lengths.append(length)
        places.extend(range(starts[i], starts[i] + length + 1))
        lines.extend([*(range(first, first + length) if first >= 0 else [-1] * length), -1])
        tokens.extend([*draft.tokens, 0])
        heat.extend([row.params.temperature] * (length + 1))
        uniforms.extend(uniform(row.seed, row.draws + k) for k in range(length + 1))
        states.append(draws_state(row.seed))
        keys.append(row.draws + length)
        row.draws += length + 1
    count = len(places)
    longs, ints, floats = _sent(
        logits.device, [states, keys], [places, lines, tokens, begins, lengths], [heat], uniforms
    )
    by_position = (ints[0], ints[1], ints[2], floats[0], longs[2].view(torch.float64)[:count])
    found = reject(logits, kept, by_position, (ints[3], ints[4], longs[0], longs[1]), logits.shape[1])
    for i, (accepted, sound, token) in zip(chosen, found.tolist(), strict=True):
        verdict.path[i], verdict.next_token[i], verdict.failed[i] = range(accepted), token, not sound


def _sent(
    device: torch.device,
    longs: list[list[int]],
    ints: list[list[int]],
    floats: list[list[float]],
    doubles: list[float] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists as int64, int32, float32 on the device, by one copy; `doubles` as bits of one more int64."""
    parts = [np.array(values, dtype=np.int64) for values in longs]
    if doubles is not None:
        parts.append(np.array(doubles, dtype=np.float64).view(np.int64))
    narrow = [np.array(values, dtype=np.int32) for values in ints]
    narrow += [np.array(values, dtype=np.float32).view(np.int32) for values in floats]
    words = np.concatenate([*(part.view(np.int32) for part in parts), *narrow])
    there = torch.from_numpy(words).pin_memory().to(device, non_blocking=True)
    sizes = [*(2 * len(part) for part in parts), *map(len, narrow)]
    found = list(there.split(sizes))
    wide = [each.view(torch.int64) for each in found[: len(parts)]]
    rest = found[len(parts) :]
    return wide, rest[: len(ints)], [each.view(torch.float32) for each in rest[len(ints) :]]
