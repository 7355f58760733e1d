"""Verification: which draft tokens stand, and the target's own next token.

Coupled rows (greedy is the case of no noise): the target's choice at each position is
argmax(log p + g); a draft token stands if it is that choice (arXiv 2408.07978).
Rejection rows: token y stands with probability min(1, p(y) / q(y)); at the first that falls the
next token is drawn from norm(max(p - q, 0)), after a full acceptance from p (Leviathan et al.,
arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.sampling import Place, plain, scaled_logits
from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft, Verdict, agreed
from engine.speculation.noise import GumbelNoise, RandomSource

if TYPE_CHECKING:
    from engine.speculation.device_verifier import DeviceVerifier


class Verifier:
    def __init__(self, eos_ids: Seq[int], noise: GumbelNoise, random: RandomSource) -> None:
        self._eos_ids, self._noise, self._random = eos_ids, noise, random
        self._on_device: DeviceVerifier | None = None

    def warm(self, logits: Tensor) -> None:
        """Compiles what verifying logits [>= 2, V] of this kind needs on a GPU."""
        if logits.is_cuda:
            self._device_verifier().warm(logits)

    def _device_verifier(self) -> DeviceVerifier:
        if self._on_device is None:
            from engine.speculation.device_verifier import DeviceVerifier  # imports triton

            self._on_device = DeviceVerifier()
        return self._on_device

    def verify(self, rows: Seq[Sequence], drafts: Seq[RowDraft], logits: Tensor) -> Verdict:
        """`logits` [sum(len(draft) + 1), V]: the target's at every position of every row, in order."""
        if not logits.is_cuda:
            return self._on_host(rows, drafts, logits)
        starts = [0, *accumulate(len(draft.tokens) + 1 for draft in drafts)]
        easy = [i for i, row in enumerate(rows) if plain(row) and not drafts[i].laws]
        hard = [i for i in range(len(rows)) if i not in set(easy)]
        verdict = Verdict.of(len(rows))
        if easy:
            mine = [rows[i] for i in easy], [drafts[i] for i in easy], [starts[i] for i in easy]
            verdict.fill(easy, self._device_verifier().verify(*mine, logits))
        if hard:
            their = torch.cat([logits[starts[i] : starts[i + 1]] for i in hard])
            verdict.fill(hard, self._on_host([rows[i] for i in hard], [drafts[i] for i in hard], their))
        return verdict

    def _on_host(self, rows: Seq[Sequence], drafts: Seq[RowDraft], logits: Tensor) -> Verdict:
        places = [
            Place(row, draft.tokens[:k])
            for row, draft in zip(rows, drafts, strict=True)
            for k in range(len(draft.tokens) + 1)
        ]
        scaled = scaled_logits(logits, places, self._eos_ids)
        bad: list[bool] = (~scaled.amax(-1).isfinite()).tolist()  # NaN wins amax
        verdict = Verdict.of(len(rows))
        coupled: list[int] = []
        rejection: list[int] = []
        starts: list[int] = []
        start = 0
        for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            starts.append(start)
            end = start + len(draft.tokens) + 1
            verdict.failed[i] = any(bad[start:end])
            if not verdict.failed[i]:
                (coupled if row.coupled else rejection).append(i)
            start = end
        if coupled:
            self._coupled(coupled, starts, rows, drafts, scaled, verdict)
        if rejection:
            self._rejection(rejection, starts, rows, drafts, scaled, verdict)
        return verdict

    def _coupled(
        self,
        chosen: list[int],
        starts: list[int],
        rows: Seq[Sequence],
        drafts: Seq[RowDraft],
        scaled: Tensor,
        verdict: Verdict,
    ) -> None:
        at = [starts[i] + k for i in chosen for k in range(len(drafts[i].tokens) + 1)]
        owners = [(i, k) for i in chosen for k in range(len(drafts[i].tokens) + 1)]
        values = scaled[at] if len(at) < scaled.shape[0] else scaled
        noisy = [j for j, (i, _) in enumerate(owners) if rows[i].params.temperature > 0]
        if noisy:
            seeds = [rows[owners[j][0]].seed for j in noisy]
            positions = [len(rows[owners[j][0]].tokens) + owners[j][1] for j in noisy]
            values = values.to(torch.float64)
            values[noisy] += self._noise(seeds, positions)
        choices = iter(values.argmax(-1).tolist())
        for i in chosen:
            mine = [next(choices) for _ in range(len(drafts[i].tokens) + 1)]
            accepted = agreed(drafts[i].tokens, mine)
            verdict.accepted[i], verdict.next_token[i] = accepted, mine[accepted]

    def _rejection(
        self,
        chosen: list[int],
        starts: list[int],
        rows: Seq[Sequence],
        drafts: Seq[RowDraft],
        scaled: Tensor,
        verdict: Verdict,
    ) -> None:
        laws = scaled.softmax(-1)
        ratios, owners = [], []
        for i in chosen:
            for k, token in enumerate(drafts[i].tokens):
                p = laws[starts[i] + k, token]
                q = drafts[i].law(k)
                ratios.append(p if q is None else p / q[token])
                owners.append(rows[i])
        stands = iter(
            self._random.bernoulli(torch.stack(ratios).clamp(max=1), owners).tolist() if ratios else []
        )
        residuals = []
        for i in chosen:
            outcomes = [next(stands) for _ in drafts[i].tokens]
            accepted = [*outcomes, False].index(False)
            verdict.accepted[i] = accepted
            residuals.append(residual(laws[starts[i] + accepted], drafts[i], accepted))
        tokens = self._random.categorical(torch.stack(residuals), [rows[i] for i in chosen]).tolist()
        for i, token in zip(chosen, tokens, strict=True):
            verdict.next_token[i] = token


def residual(p: Tensor, draft: RowDraft, accepted: int) -> Tensor:
    """float[V]: norm(max(p - q, 0)) at the first draft token that fell; p itself if all stand.

    If rounding leaves nothing of it, p is q and the token could not have fallen but by rounding: p.
    """
    if accepted == len(draft.tokens):
        return p
    rest = p.clone()
    q = draft.law(accepted)
    if q is None:
        rest[draft.tokens[accepted]] = 0
    else:
        rest = (rest - q).clamp(min=0)
    total = rest.sum()
    return torch.where(total > 0, rest / total, p)
