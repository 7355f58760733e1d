"""What drafters, policies and trees' tables may say. What cannot be is a fault of theirs, found here.

Of what lies on a GPU only shapes and types are looked at, except where it is read back anyway: to read a
law's numbers there would hold every step up, and our kernels made them (NaN is found where they draw).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from collections.abc import Set

import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.drafters.base import Drafted, RowDraft
from engine.speculation.faults import DraftFault, fatal
from engine.speculation.tree import MOST_NODES

_ROUNDING = 1e-3  # by which a law's sum may be off 1
_UNTOLD = -1  # for a limit that is no number of tokens
_MOST = 2.0**31  # tokens: more is as good as this, and fits int64
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
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


def drafts_said(
    drafted: object, limits: Seq[int], deepest: Seq[int], vocab: int, device: torch.device
) -> tuple[Drafted, dict[int, str]]:
    """What a drafter hands over for rows that may draft so much, and why some of them cannot be verified.
    `deepest`: the most tokens on one way; `device`: the target's.

    Raises DraftFault, or what reading it raises, for what is not even drafts of these rows.
    """
    if not isinstance(drafted, Drafted):
        raise DraftFault(f"{len(limits)} rows got {type(drafted).__name__}, no drafts")
    drafted.rows = list(drafted.rows)
    if len(drafted.rows) != len(limits) or len(set(map(id, drafted.rows))) < len(limits):
        raise DraftFault(f"{len(limits)} rows got {len(set(map(id, drafted.rows)))} drafts")
    if not all(type(n) is int and 0 < n < _MOST and 0 <= seconds < math.inf for n, seconds in drafted.steps):
        raise DraftFault(f"steps cannot have taken (rows, seconds) {drafted.steps}")
    if not isinstance(drafted.fault, Exception | None):
        raise DraftFault(f"its fault is {drafted.fault!r}")
    asked = zip(drafted.rows, limits, deepest, strict=True)
    found = ((i, _flaw(draft, most, depth, vocab, device)) for i, (draft, most, depth) in enumerate(asked))
    return drafted, {i: flaw for i, flaw in found if flaw is not None}


def kv_said(seq: Sequence, drafted: int) -> str | None:
    """What cannot be of what a drafter says to have read of a row, behind which it drafted so much."""
    least = 0 if seq.table is None else seq.table.draft_tokens
    if type(seq.draft_kv_len) is int and least <= seq.draft_kv_len <= len(seq.tokens) + drafted:
        return None
    return f"a KV of {seq.draft_kv_len!r} tokens, of {len(seq.tokens) + drafted}"


def _flaw(draft: RowDraft, most: int, deepest: int, vocab: int, device: torch.device) -> str | None:
    try:
        return (
            _no_draft(draft)
            or _no_tokens(draft, most, vocab)
            or (None if draft.parents is None else _no_tree(draft, draft.parents))
            or (f"a way of {draft.lookahead} tokens of {deepest}" if draft.lookahead > deepest else None)
            or _no_law(draft, vocab, device)
        )
    except Exception as error:
        if fatal(error):
            raise
        return f"what cannot be read, {type(error).__name__}: {error}"


def _no_draft(draft: RowDraft) -> str | None:
    if not isinstance(draft, RowDraft):
        return f"{type(draft).__name__}, no draft"
    lists = draft.tokens, draft.laws, draft.read, draft.joint, [] if draft.parents is None else draft.parents
    if not all(type(each) is list for each in lists):
        return f"{', '.join(type(each).__name__ for each in lists)} where lists belong"
    if type(draft.unsound) is not bool or draft.trimmed != 0:
        return f"unsound {draft.unsound!r}, {draft.trimmed!r} tokens trimmed"
    return None if draft.stop_reason in _REASONS else f"a stop for the reason {draft.stop_reason!r}"


def _no_tokens(draft: RowDraft, most: int, vocab: int) -> str | None:
    tokens = draft.tokens
    if len(tokens) > (most if draft.parents is None else min(most, MOST_NODES)):
        return f"{len(tokens)} tokens where {most} were asked for"
    if tokens and (set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) >= vocab):
        return "a token outside of the vocabulary"
    return None


def _no_tree(draft: RowDraft, parents: list[int]) -> str | None:
    nodes = len(draft.tokens)
    if len(parents) != nodes or not all(type(p) is int and -1 <= p < k for k, p in enumerate(parents)):
        return "a tree whose nodes do not follow earlier ones"
    if len(set(zip(parents, draft.tokens, strict=True))) < nodes:
        return "a tree with the same token twice behind one node"
    if len(draft.read) != nodes or not all(type(at) is int and -1 <= at < MOST_NODES for at in draft.read):
        return "a tree whose nodes were not read where it says"
    if len(draft.joint) not in (0, nodes) or not all(map(math.isfinite, draft.joint)):
        return "a tree whose nodes' chances are no numbers"
    return None


def _no_law(draft: RowDraft, vocab: int, device: torch.device) -> str | None:
    tokens = len(draft.tokens)
    if draft.laws and (len(draft.laws) != tokens or draft.kept is not None):
        return f"{len(draft.laws)} laws for {tokens} tokens"
    if draft.kept is not None:
        kept, first, heat = draft.kept
        here = _over(kept, (len(kept), vocab), {torch.bfloat16}, device) and kept.is_contiguous()
        if not here or type(first) is not int or not 0 <= first <= len(kept) - tokens:
            return "logits kept that are not over the vocabulary"
        if not 0 < heat < math.inf:
            return f"logits kept for a temperature of {heat}"
    if not all(_over(law, (vocab,), _FLOATS, device) for law in draft.laws):
        return "a law that is not over the vocabulary"
    return _no_numbers(draft) if device.type == "cpu" else None


def _no_numbers(draft: RowDraft) -> str | None:
    """What no token can have been drawn from, or not its token."""
    seen: dict[int, Tensor] = {}  # siblings share theirs
    for k, token in enumerate(draft.tokens):
        law = draft.law(k)
        if law is None:
            return None
        if id(law) not in seen:
            seen[id(law)] = law
            least, total = (
                float(law.min()),
                float(law.sum(dtype=torch.promote_types(law.dtype, torch.float32))),
            )
            if not (least >= 0 and abs(total - 1) <= _ROUNDING):  # or NaN
                return f"a law whose least number is {least:g}, and whose sum {total:g}"
        if not law[token] > 0:
            return "a token that its law never gives"
    return None


def _over(values: object, shape: tuple[int, ...], types: Set[torch.dtype], device: torch.device) -> bool:
    return (
        isinstance(values, Tensor)
        and (values.shape, values.device.type, values.layout) == (shape, device.type, torch.strided)
        and values.dtype in types
    )
