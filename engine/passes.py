"""A planned row and the target's pass: what is read of it, which logits are its, where accepted KV goes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.kv.pool import moves
from engine.models.runner import Chunk
from engine.scheduler import PlanRow


def chunk_of(row: PlanRow) -> Chunk:
    """What the target reads of a row: what is pending, and its draft."""
    seq = row.seq
    tokens = seq.tokens[seq.kv_len : seq.kv_len + row.tokens] + row.draft.tokens
    scored = seq.params.prompt_logprobs is not None and seq.kv_len < seq.prompt_len
    # A chunk that does not sample gives its last logits all the same: they are checked for NaN.
    logits = len(tokens) if scored else len(row.draft.tokens) + 1
    return Chunk(tokens, seq.kv_len, seq.blocks, logits, row.draft.branches(seq.kv_len))


def tail(row: PlanRow, count: int) -> Tensor:
    """The row's last `count` logits."""
    assert row.logits is not None
    return row.logits[-count:]


def moves_of(rows: Seq[PlanRow], size: int) -> list[tuple[int, int]]:
    """Slots (from, to), for blocks of `size`: behind a tree's accepted way slot is to be position again."""
    return [
        pair for row in rows for pair in moves(row.seq.blocks, row.seq.kv_len + row.tokens, row.path, size)
    ]
