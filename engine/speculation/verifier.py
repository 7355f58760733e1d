"""Verification: which draft tokens stand, and the target's own next token.

Coupled rows (greedy is the case of no noise): the target's choice at each position is
argmax(log p + g); a draft token stands if it is that choice (arXiv 2408.07978).
Rejection rows: token y stands with probability min(1, p(y) / q(y)); where it falls, its next sibling
is tried against norm(max(p - q, 0)) in place of p, and after the last one the next token is drawn from
that; after a full acceptance from p (Leviathan et al., arXiv 2211.17192; DySpec, arXiv 2410.11744).
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
        """`logits` [sum(len(draft) + 1), V]: the target's at every position of every row, in order.

        Rows fail if any of theirs are NaN or infinite.
        """
        if not logits.is_cuda:
            return self._on_host(rows, drafts, logits)
        starts = [0, *accumulate(len(draft.tokens) + 1 for draft in drafts)]
        easy = [
            i
            for i, row in enumerate(rows)
            if plain(row) and not drafts[i].laws and (row.coupled or drafts[i].parents is None)
        ]
        hard = [i for i in range(len(rows)) if i not in set(easy)]
        verdict = Verdict.of(len(rows))
        if easy:
            mine = [rows[i] for i in easy], [drafts[i] for i in easy], [starts[i] for i in easy]
            verdict.fill(easy, self._device_verifier().verify(*mine, logits))
        if hard:
            their = torch.cat([logits[starts[i] : starts[i + 1]] for i in hard])
            verdict.fill(hard, self._on_host([rows[i] for i in hard], [drafts[i] for i in hard], their))
        return verdict

    def verify_reached(self, rows: Seq[Sequence], drafts: Seq[RowDraft], logits: Tensor) -> Verdict:
        """The same, but rows fail only if there is no law at their end. A draft token that stands, and behind
        which there is none, is the next token: what comes then is the next pass's."""
        return self._on_host(rows, drafts, logits, reached=True)

    def _on_host(
        self, rows: Seq[Sequence], drafts: Seq[RowDraft], logits: Tensor, reached: bool = False
    ) -> Verdict:
        places = [
            Place(row, before) for row, draft in zip(rows, drafts, strict=True) for before in draft.before()
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
            verdict.failed[i] = bad[start] if reached else any(bad[start:end])
            if not verdict.failed[i]:
                (coupled if row.coupled else rejection).append(i)
            start = end
        if coupled:
            self._coupled(coupled, starts, rows, drafts, scaled, bad, verdict)
        if rejection:
            self._rejection(rejection, starts, rows, drafts, scaled, bad, verdict)
        return verdict

    def _coupled(
        self,
        chosen: list[int],
        starts: list[int],
        rows: Seq[Sequence],
        drafts: Seq[RowDraft],
        scaled: Tensor,
        bad: Seq[bool],
        verdict: Verdict,
    ) -> None:
        at = [starts[i] + k for i in chosen for k in range(len(drafts[i].tokens) + 1)]
        owners = [(rows[i], depth) for i in chosen for depth in drafts[i].depths()]
        values = scaled[at] if len(at) < scaled.shape[0] else scaled
        noisy = [j for j, (row, _) in enumerate(owners) if row.params.temperature > 0]
        if noisy:
            seeds = [owners[j][0].seed for j in noisy]
            positions = [len(owners[j][0].tokens) + owners[j][1] for j in noisy]
            values = values.to(torch.float64)
            values[noisy] += self._noise(seeds, positions)
        choices = iter(values.argmax(-1).tolist())
        for i in chosen:
            broken = bad[starts[i] : starts[i] + len(drafts[i].tokens) + 1]
            mine = [-1 if none else choice for none, choice in zip(broken, choices, strict=False)]
            verdict.path[i], verdict.next_token[i] = agreed(drafts[i], mine)

    def _rejection(
        self,
        chosen: list[int],
        starts: list[int],
        rows: Seq[Sequence],
        drafts: Seq[RowDraft],
        scaled: Tensor,
        bad: Seq[bool],
        verdict: Verdict,
    ) -> None:
        """All rows walk at once: every one tries the next child of where it stands, or is at its end."""
        laws = scaled.softmax(-1)
        walks = {}
        for i in chosen:
            mine = slice(starts[i], starts[i] + len(drafts[i].tokens) + 1)
            walks[i] = Walk(drafts[i], laws[mine], bad[mine])
        trying = list(chosen)
        while trying := [i for i in trying if walks[i].tries()]:
            chances = torch.stack([walks[i].chance() for i in trying]).clamp(max=1)
            stands = self._random.bernoulli(chances, [rows[i] for i in trying]).tolist()
            for i, stood in zip(trying, stands, strict=True):
                walks[i].step(stood)
        rest = torch.stack([walk.law for walk in walks.values()])
        tokens = self._random.categorical(rest, [rows[i] for i in chosen]).tolist()
        for i, token in zip(chosen, tokens, strict=True):
            verdict.path[i], verdict.next_token[i] = walks[i].path, token


class Walk:
    """One row's way through its draft: the children of a node are tried in the order in which they were drawn
    (DySpec, arXiv 2410.11744; a chain's only child is Leviathan et al.'s case).

    `law` float[V]: what the next token is drawn from if no child is left to try.
    """

    def __init__(self, draft: RowDraft, laws: Tensor, bad: Seq[bool]) -> None:
        """`laws` [len(draft) + 1, V]: the target's at the row's end, then at every node; `bad` ones are none.
        The first is one."""
        self._draft, self._laws, self._bad = draft, laws, bad
        self._children = draft.children()
        self.path: list[int] = []
        self.law, self._left = laws[0], iter(self._children[0])
        self._child = -1
        self._q: Tensor | None = None  # the child's law, without what was taken before it

    def tries(self) -> bool:
        """Whether a child is left; it is the one that `chance` and `step` are about."""
        before, self._child = self._child, next(self._left, -1)
        if self._child < 0:
            return False
        q = self._draft.law(self._child)
        if q is not None and before >= 0:  # what the siblings were is not drawn again
            assert self._q is not None
            q = taken(self._q, self._draft.tokens[before])
        self._q = q
        return True

    def chance(self) -> Tensor:
        """float[]: with which the child stands, if below 1."""
        token = self._draft.tokens[self._child]
        p = self.law[token]
        return p if self._q is None else p / self._q[token]

    def step(self, stood: bool) -> None:
        """Goes to the child, or takes it out of the law. Where there is no law behind it, the child itself is
        the next token for certain."""
        if stood and self._bad[self._child + 1]:
            self.law, self._left = torch.zeros_like(self.law), iter(())
            self.law[self._draft.tokens[self._child]] = 1
        elif stood:
            self.path.append(self._child)
            self.law, self._left = self._laws[self._child + 1], iter(self._children[self._child + 1])
            self._child = -1
        else:
            self.law = residual(self.law, self._q, self._draft.tokens[self._child])


def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """float[V]: norm(max(p - q, 0)), after a token drawn from q fell (None: q is one-hot).

    If rounding leaves nothing of it, p is q and the token could not have fallen but by rounding: p.
    """
    if q is None:
        return taken(p, token)
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    return torch.where(total > 0, rest / total, p)


def taken(law: Tensor, token: int) -> Tensor:
    """float[V]: the law without the token; itself if that leaves nothing."""
    rest = law.clone()
    rest[token] = 0
    total = rest.sum()
    return torch.where(total > 0, rest / total, law)
