"""What drafters, policies and trees' tables may say. What cannot be is a fault of theirs, found here.

Of what lies on the device only shapes and types are looked at, except where it is read back anyway: what a
law's numbers are, a drafter answers for (NaN is found where it draws).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.faults import DraftFault
from engine.speculation.tree import MOST_NODES

_UNTOLD = -1  # for a limit that is no number of tokens
_MOST = 2.0**31  # tokens: more is as good as this, and fits int64
_REASONS = frozenset({None, "policy", "cap", "room", "drafter"})


def limits_said(limits: Tensor, rows: Tensor) -> Tensor:
    """int64[B] of a policy's answer for `rows` [B]; negative where it is no number of tokens.

    Floats that are whole are taken as integers. Raises ValueError for what is no such tensor.
    """
    _fits(limits, rows)
    if limits.dtype == torch.bool or limits.is_complex():
        raise ValueError(f"a limit is {limits.dtype}, no number")
    if limits.is_floating_point():
        wide = limits.double()
        whole = wide.isfinite() & (wide == wide.trunc())
        limits = torch.where(whole, wide, _UNTOLD).clamp(max=_MOST)
    return limits.long()


def decisions_said(keep: Tensor, rows: Tensor) -> Tensor:
    """bool[B], a policy's answer for `rows` [B]. Raises ValueError for what is no such tensor."""
    _fits(keep, rows)
    if keep.dtype != torch.bool:
        raise ValueError(f"whether to draft on is {keep.dtype}, not bool")
    return keep


def _fits(answer: object, rows: Tensor) -> None:
    if not isinstance(answer, Tensor) or answer.shape != rows.shape:
        said = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"its answer for {len(rows)} rows is of {said}")


def wishes_said(wishes: list[int], rows: int) -> list[int]:
    """A table's answer for so many rows. Raises DraftFault for what is none."""
    if len(wishes) != rows:
        raise DraftFault(f"{rows} rows were told {len(wishes)} limits")
    if not all(type(wish) is int and wish >= 0 for wish in wishes):
        raise DraftFault(f"a limit is no number of tokens: {wishes}")
    return wishes


def flaws(drafted: Drafted, limits: Seq[int], deepest: Seq[int], vocab: int) -> dict[int, str]:
    """The rows whose drafts cannot be verified, and why; `deepest`: the most tokens on one way.

    Raises DraftFault, or what reading it raises, for what is not even drafts of these rows. Of laws only the
    shape is looked at: to read their numbers would hold every step up.
    """
    if len(drafted.rows) != len(limits):
        raise DraftFault(f"{len(limits)} rows got {len(drafted.rows)} drafts")
    if not all(count > 0 and 0 <= seconds < math.inf for count, seconds in drafted.steps):
        raise DraftFault(f"steps cannot have taken (rows, seconds) {drafted.steps}")
    return {
        i: flaw
        for i, (draft, most, depth) in enumerate(zip(drafted.rows, limits, deepest, strict=True))
        if (flaw := _flaw(draft, most, depth, vocab)) is not None
    }


def _flaw(draft: RowDraft, most: int, deepest: int, vocab: int) -> str | None:
    """What the host can see of it."""
    tokens, parents = draft.tokens, draft.parents
    if len(tokens) > (most if parents is None else min(most, MOST_NODES)):
        return f"{len(tokens)} tokens where {most} were asked for"
    if tokens and (set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) >= vocab):
        return "a token outside of the vocabulary"
    if draft.stop_reason not in _REASONS:
        return f"a stop for the reason {draft.stop_reason!r}"
    if draft.laws and len(draft.laws) != len(tokens):
        return f"{len(draft.laws)} laws for {len(tokens)} tokens"
    if not all(law.shape == (vocab,) and law.is_floating_point() for law in draft.laws):
        return "a law that is not over the vocabulary"
    if parents is not None:
        if len(parents) != len(tokens) or not all(
            type(parent) is int and -1 <= parent < k for k, parent in enumerate(parents)
        ):
            return "a tree whose nodes do not follow earlier ones"
        if len(set(zip(parents, tokens, strict=True))) < len(tokens):
            return "a tree with the same token twice behind one node"
    if draft.lookahead > deepest:
        return f"a way of {draft.lookahead} tokens where {deepest} were asked for"
    return None
