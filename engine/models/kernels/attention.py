"""Attention over the paged KV for chains, trees and prefill chunks, the context split where rows are few.

One program has `ROWS` queries that share a KV head (tokens times the heads of the group), so that
keys are read once for all of them. With more than one split a second kernel adds the parts, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass
class Places:
    """Where B ragged rows of a packed batch have their queries and their KV. All int32, on the device.

    The last four as in `runner.Branches`, for passes with trees in them; None where each new token attends
    those before it (chains, and prefill chunks). No window may be narrower than a tree is deep.
    """

    starts: Tensor  # [B], KV length before this pass
    begins: Tensor  # [B], the row's first token in the batch
    lengths: Tensor  # [B], its tokens; 0 for a row that is not there
    tables: Tensor  # [B, blocks]
    longest: int  # the most tokens a row may have in this pass
    positions: Tensor | None = None  # int32 or int64[N]
    trunks: Tensor | None = None  # [B]
    sees: Tensor | None = None  # [N]
    masks: Tensor | None = None  # int64[N]


@triton.jit(  # what varies with every prompt must not compile another variant
    do_not_specialize=["table_stride", "tokens", "splits"],
    do_not_specialize_on_alignment=[
        "starts",
        "begins",
        "lengths",
        "tables",
        "positions",
        "trunks",
        "sees",
        "masks",
    ],
)
def _attend(
    q,
    keys,
    values,
    out,
    part,
    stats,
    starts,
    begins,
    lengths,
    tables,
    table_stride,
    positions,
    trunks,
    sees,
    masks,
    scale,
    tokens,
    splits,
    WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    row, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    length = tl.load(lengths + row)
    if tile * ROWS < length * FOLD:
        start, begin = tl.load(starts + row), tl.load(begins + row).to(tl.int64)
        query = tile * ROWS + tl.arange(0, ROWS)
        token, member = query // FOLD, query % FOLD
        real = token < length
        d = tl.arange(0, WIDTH)
        inside = d < DIM
        heads = KV_HEADS * FOLD
        line = begin + token  # in the packed batch
        q_at = (line * (heads + 2 * KV_HEADS) + head * FOLD + member)[:, None] * DIM + d[None]
        qs = tl.load(q + q_at, real[:, None] & inside[None], 0.0)
        last = tl.minimum(length, (tile * ROWS + ROWS - 1) // FOLD + 1)  # tokens up to the tile's last
        high = start + (length if HAS_MASK else last)
        below, place = start + token + 1, start + token
        if HAS_MASK:  # `below` these slots it attends all, further on those of its mask
            trunk = tl.load(trunks + row)
            below = tl.load(sees + line, real, 0)
            place = tl.load(positions + line, real, 1 << 30).to(tl.int32)
            mask = tl.load(masks + line, real, 0)
        low = 0
        if WINDOW > 0:
            low = tl.maximum((tl.min(place, 0) if HAS_MASK else start + tile * ROWS // FOLD) - WINDOW + 1, 0)
        steps = tl.cdiv(high - low, STEP)
        first = low + steps * split // splits * STEP
        end = tl.minimum(low + steps * (split + 1) // splits * STEP, high)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(first, end, STEP):
            n = at + tl.arange(0, STEP)
            there = n < end
            block = tl.load(tables + row * table_stride + n // BLOCK, there, 0).to(tl.int64)
            kv_at = ((block * BLOCK + n % BLOCK) * KV_HEADS + head)[:, None] * DIM + d[None]
            # Nothing beyond the row is read: a freed block may hold NaN, and 0 * NaN is NaN.
            kv_mask = there[:, None] & inside[None]
            k = tl.load(keys + kv_at, kv_mask, 0.0)
            scores = tl.dot(qs, tl.trans(k), input_precision=PRECISION) * scale
            seen = n[None] < below[:, None]
            if WINDOW > 0:
                seen = seen & (n[None] > place[:, None] - WINDOW)
            if HAS_MASK:
                node = n - trunk
                bit = (mask[:, None] >> tl.minimum(tl.maximum(node, 0), 63)[None].to(tl.int64)) & 1
                seen = seen | ((bit == 1) & (node >= 0)[None] & (node < 64)[None])
            scores = tl.where(seen & there[None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            keep = tl.exp2(top - base)
            p = tl.exp2(scores - base[:, None])
            total = total * keep + tl.sum(p, 1)
            v = tl.load(values + kv_at, kv_mask, 0.0)
            acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            top = higher
        o_at = (line * heads + head * FOLD + member)[:, None] * DIM + d[None]
        if not SPLIT:
            result = acc / tl.where(real, total, 1.0)[:, None]
            tl.store(out + o_at, result.to(out.dtype.element_ty), real[:, None] & inside[None])
        else:
            base64 = split.to(tl.int64) * tokens * heads
            tl.store(part + base64 * DIM + o_at, acc, real[:, None] & inside[None])
            s_at = (base64 + line * heads + head * FOLD + member) * 2
            tl.store(stats + s_at, top, real)
            tl.store(stats + s_at + 1, total, real)


@triton.jit(do_not_specialize=["splits"])
def _combine(part, stats, out, heads, splits, DIM: tl.constexpr, WIDTH: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    size = tl.num_programs(0).to(tl.int64) * heads
    d = tl.arange(0, WIDTH)
    best = float("-inf")
    for i in range(splits):
        best = tl.maximum(best, tl.load(stats + (i * size + line) * 2))
    total = 0.0
    acc = tl.zeros([WIDTH], tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(stats + (i * size + line) * 2) - best)
        total += weight * tl.load(stats + (i * size + line) * 2 + 1)
        acc += weight * tl.load(part + (i * size + line) * DIM + d, d < DIM, 0.0)
    tl.store(out + line * DIM + d, (acc / total).to(out.dtype.element_ty), d < DIM)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Places,
    *,
    heads: int,
    scaling: float,
    window: int | None,
    block_size: int,
    programs: int,
) -> Tensor:
    """The queries of `qkv` [N, heads + 2 kv_heads, dim] over the pool -> [N, heads * dim].

    keys, values [pool slots, kv_heads, dim], with this pass's own already in them. `programs`: how
    many the device runs at once; rows too few for it have their context split.
    """
    kv_heads, dim = keys.shape[1], keys.shape[2]
    tokens, rows, fold = qkv.shape[0], places.starts.shape[0], heads // kv_heads
    size = min(max(16, triton.next_power_of_2(places.longest * fold)), 64)
    tiles = triton.cdiv(places.longest * fold, size)
    splits = max(1, min(64, programs // (tiles * kv_heads * rows)))
    out = qkv.new_empty(tokens, heads * dim)
    part = stats = out
    if splits > 1:
        part = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(splits, tokens, heads, 2, dtype=torch.float32, device=out.device)
    width = max(16, triton.next_power_of_2(dim))
    step = 64 if size > 16 or qkv.dtype != torch.float32 else 32
    _attend[(tiles, kv_heads, rows * splits)](
        qkv,
        keys,
        values,
        out,
        part,
        stats,
        places.starts,
        places.begins,
        places.lengths,
        places.tables,
        places.tables.stride(0),
        places.starts if places.positions is None else places.positions,
        places.starts if places.trunks is None else places.trunks,
        places.starts if places.sees is None else places.sees,
        places.starts if places.masks is None else places.masks,
        scaling * 1.4426950408889634,
        tokens,
        splits,
        WINDOW=window or 0,
        HAS_MASK=places.masks is not None,
        KV_HEADS=kv_heads,
        FOLD=fold,
        DIM=dim,
        WIDTH=width,
        ROWS=size,
        STEP=step,
        BLOCK=block_size,
        SPLIT=splits > 1,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    if splits > 1:
        _combine[(tokens, heads)](part, stats, out, heads, splits, DIM=dim, WIDTH=width, num_warps=1)
    return out
