"""Paged attention in plain torch, as an attention function of transformers.

Rows of one query length are attended together, padded to their longest context; a row alone whose
blocks are a contiguous run is read without a copy. Query heads that share a KV head are folded
into the query axis, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kv.pool import KVPool
from engine.models.runner import Batch, Inputs

NAME = "disco_paged"


@dataclass
class Sight:
    """What the queries of a group see where they are no chain; see `Branches`."""

    trunk: Tensor  # int64[G, 1, 1]
    sees: Tensor  # int64[G, Q, 1]
    masks: Tensor  # int64[G, Q, 1]

    def of(self, slots: Tensor, window_from: Tensor | None) -> Tensor:
        """bool[G, Q, C]. `window_from` int64[G, Q, 1]: positions up to there are not attended."""
        at = slots - self.trunk
        node = (at >= 0) & (at < 64) & (((self.masks >> at.clamp(0, 63)) & 1) == 1)
        seen = slots < self.sees
        if window_from is not None:
            depth = node.cumsum(-1)  # ancestors lie in the order of their positions, behind the trunk
            seen = seen & (slots > window_from)
            node = node & (self.trunk + depth - 1 > window_from)
        return seen | node


@dataclass
class Group:
    """G rows of one query length Q: where their queries lie and where their KV is."""

    rows: int
    query_len: int
    queries: Tensor | slice  # the G * Q tokens, in the packed batch
    kv: Tensor | slice  # slots: int64[G * C], or a run of C slots if G is 1
    query_pos: Tensor  # int64[G, Q]
    sight: Sight | None  # None: chains
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)  # by sliding window
    context: int = 0  # C, the longest context in the group

    def mask(self, window: int | None, fold: int) -> Tensor | None:
        """bool[G, 1, fold * Q, C], True where attended; None where all is. HF's window: the last `window`."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, fold)
        return self.masks[window]

    def _mask(self, window: int | None, fold: int) -> Tensor | None:
        alone = self.rows == 1 and self.query_len == 1 and self.sight is None
        if alone and (window is None or window >= self.context):
            return None
        kv_pos = torch.arange(self.context, device=self.query_pos.device)
        query_pos = self.query_pos[:, :, None]
        outside = None if window is None else query_pos - window
        if self.sight is not None:
            mask = self.sight.of(kv_pos, outside)
        else:
            mask = kv_pos <= query_pos
            if outside is not None:
                mask &= kv_pos > outside
        return mask.repeat(1, fold, 1)[:, None]


def plan(batch: Batch, inputs: Inputs, block_size: int) -> list[Group]:
    """The groups of one batch; made once and used by every layer."""
    starts = [0]
    for length in batch.query_lens:
        starts.append(starts[-1] + length)
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(batch.query_lens):
        by_length.setdefault(length, []).append(row)
    return [_group(batch, inputs, rows, length, starts, block_size) for length, rows in by_length.items()]


def _group(
    batch: Batch, inputs: Inputs, rows: list[int], length: int, starts: list[int], block_size: int
) -> Group:
    device = inputs.slots.device
    context = max(batch.context_lens[row] for row in rows)
    queries: Tensor | slice
    kv: Tensor | slice
    if rows[-1] - rows[0] == len(rows) - 1:
        queries = slice(starts[rows[0]], starts[rows[-1] + 1])
    else:
        at = [i for row in rows for i in range(starts[row], starts[row + 1])]
        queries = torch.tensor(at, dtype=torch.int64, device=device)
    blocks = [batch.block_tables[row][: -(-batch.context_lens[row] // block_size)] for row in rows]
    if len(rows) == 1 and all(b - a == 1 for a, b in zip(blocks[0], blocks[0][1:], strict=False)):
        kv = slice(blocks[0][0] * block_size, blocks[0][0] * block_size + context)
    else:
        kv = _slots(blocks, [batch.context_lens[row] for row in rows], block_size, device)
    query_pos = inputs.positions[queries].view(len(rows), length)
    sight = _sight(batch, rows, length, starts, device)
    return Group(len(rows), length, queries, kv, query_pos, sight, context=context)


def _sight(
    batch: Batch, rows: list[int], length: int, starts: list[int], device: torch.device
) -> Sight | None:
    if all(batch.branches[row] is None for row in rows):
        return None
    trunks, sees, masks = batch.sights()
    at = [i for row in rows for i in range(starts[row], starts[row + 1])]
    words = [[sees[i] for i in at], [masks[i] for i in at]]
    told = torch.tensor(words, dtype=torch.int64, device=device).view(2, len(rows), length, 1)
    trunk = torch.tensor([trunks[row] for row in rows], dtype=torch.int64, device=device)
    return Sight(trunk[:, None, None], told[0], told[1])


def _slots(blocks: list[Seq[int]], lengths: list[int], block_size: int, device: torch.device) -> Tensor:
    """int64[G * C]: the slots of every row's context, the shorter ones padded with their last slot.

    Never a slot beyond a row's own context: it may hold another request's NaN, and 0 * NaN is NaN.
    """
    width, context = max(map(len, blocks)), max(lengths)
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in blocks], device=device)
    last = torch.tensor(lengths, device=device)[:, None] - 1
    at = torch.arange(context, device=device).minimum(last)  # [G, C]
    return (table.gather(1, at // block_size) * block_size + at % block_size).flatten()


def attend(
    groups: list[Group],
    pool: KVPool,
    layer: int,
    query: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [heads, N, key_dim] over the pool -> [N, heads, value_dim]."""
    heads, total, _ = query.shape
    keys, values = pool.keys[layer], pool.values[layer]
    kv_heads = keys.shape[1]
    fold = heads // kv_heads
    out = query.new_empty(total, heads, values.shape[2])
    for group in groups:
        g, q, c = group.rows, group.query_len, group.context
        # [G, kv_heads, fold * Q, D]
        queries = query[:, group.queries].view(kv_heads, fold, g, q, -1).permute(2, 0, 1, 3, 4)
        queries = queries.reshape(g, kv_heads, fold * q, -1)
        k = keys[group.kv].view(g, c, kv_heads, -1).transpose(1, 2)
        v = values[group.kv].view(g, c, kv_heads, -1).transpose(1, 2)
        mask = group.mask(window, fold)
        attended = attend_dense(queries, k, v, mask, scaling, softcap)
        # -> [G, Q, kv_heads, fold, D]
        attended = attended.view(g, kv_heads, fold, q, -1).permute(0, 3, 1, 2, 4)
        out[group.queries] = attended.reshape(g * q, heads, -1)
    return out


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """q [B, H, Q, D] over k, v [B, H, C, D]; with `softcap` c, scores are c * tanh(score / c) (Gemma 2)."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * scaling / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, N, D] each, out [1, N, heads, D]."""
    paged: Any = module.__dict__.get("paged")
    if paged is None:
        raise RuntimeError(f"{type(module).__name__} is not attached to a paged runner")
    return paged(module, query, key, value, attention_mask, **kwargs), None
