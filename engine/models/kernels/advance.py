"""After a draft step, on the device: what each row drafted, who drafts on, and what the model reads next."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST_SL = 64
"""Draft tokens that a row has room for."""
REASONS = (None, "policy", "drafter")
"""What `reason` counts: none (the limit), the policy, the drafter."""


@triton.jit
def _advance(
    token, fine, keep, position, key, limit, place, alive, length, reason, drafted, progress,
    meta, ids, positions, slots, starts, lengths, tables, table_stride, spare_slot,
    ROWS: tl.constexpr, COMPACT: tl.constexpr, MOST: tl.constexpr, SL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)
    step = tl.load(progress + 1) + 1
    was = tl.load(alive + i) != 0
    able = was & (tl.load(fine + i) != 0)
    going = tl.load(keep + i) != 0
    next_token = tl.load(token + i)
    at = tl.load(position + i)
    on = able & going & (step < tl.load(limit + i))
    tl.store(drafted + i * SL + step - 1, next_token, able)
    tl.store(length + i, tl.load(length + i) + able.to(tl.int32))
    why = tl.where(was & (able == 0), 2, tl.where(able & (going == 0), 1, 0))
    tl.store(reason + i, tl.where(was, why, tl.load(reason + i)))
    tl.store(alive + i, on.to(tl.int32))
    tl.store(position + i, at + on.to(tl.int64))
    tl.store(key + i, tl.load(key + i) + on.to(tl.int64))
    count = tl.sum(on.to(tl.int32), 0)
    if COMPACT:  # DecodeKernel's Meta: only the rows that draft on
        to = tl.cumsum(on.to(tl.int32), 0) - 1
        tl.store(place + i, tl.maximum(to, 0))
        tl.store(meta, count)
        tl.store(meta + 1, count)
        rows = meta + 8 + to
        tl.store(rows, at.to(tl.int32), on)
        tl.store(rows + MOST, to, on)
        tl.store(rows + 2 * MOST, tl.full([ROWS], 1, tl.int32), on)
        tl.store(rows + 3 * MOST, i, on)
        tl.store(rows + 4 * MOST, next_token, on)
        tl.store(rows + 5 * MOST, at.to(tl.int32), on)
        tl.store(rows + 6 * MOST, tl.full([ROWS], 1, tl.int32), on)
    else:  # every row has its place; those that have stopped write where nobody reads
        block = tl.load(tables + i * table_stride + (at // BLOCK), on, 0)
        tl.store(place + i, i)
        tl.store(ids + i, tl.where(on, next_token, 0))
        tl.store(positions + i, tl.where(on, at, 0).to(tl.int32))
        tl.store(slots + i, tl.where(on, block * BLOCK + (at % BLOCK).to(tl.int32), spare_slot))
        tl.store(starts + i, tl.where(on, at, 0).to(tl.int32))
        tl.store(lengths + i, on.to(tl.int32))
    tl.store(progress, tl.load(progress) + 1)
    tl.store(progress + 1, step)
    tl.store(progress + 2, count)


def advance(
    token: Tensor,
    fine: Tensor,
    keep: Tensor,
    rows: dict[str, Tensor],
    *,
    most: int,
    compact: bool,
    block_size: int,
    spare_slot: int,
) -> None:
    """One step on, in place. `rows` holds the buffers of `DraftLoop` by name; a power of two of rows.

    `progress` int32: number of calls ever, step of this draft, rows that draft on.
    """
    _advance[(1,)](
        token, fine, keep, rows["position"], rows["key"], rows["limit"], rows["place"],
        rows["alive"], rows["length"], rows["reason"], rows["drafted"], rows["progress"], rows["meta"],
        rows["ids"], rows["positions"], rows["slots"], rows["starts"], rows["lengths"],
        rows["tables"], rows["tables"].stride(0), spare_slot,
        ROWS=rows["alive"].shape[0], COMPACT=compact, MOST=most, SL=MOST_SL, BLOCK=block_size, num_warps=1,
    )  # fmt: skip
