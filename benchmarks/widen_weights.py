"""The weights of a widened model, one by one. See `widen`."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

if TYPE_CHECKING:
    from widen import Shape


@dataclass(frozen=True)
class Axis:
    """Where a source's entries lie along one axis of a wider weight: entry `of[i]` at `to[i]`."""

    to: Tensor  # int64[n], without repeats
    of: Tensor  # int64[n]


def _dims(head_dim: int, wide: int) -> Tensor:
    """int64[head_dim]: where a head's dimensions lie in a wider head. Rotary pairs (i, i + d/2) turn by
    theta^(-2i/d): at d' = m d that is pair m i."""
    half = torch.arange(head_dim // 2) * (wide // head_dim)
    return torch.cat([half, half + wide // 2])


class Filler:
    """Makes the wide model's weights, one by one."""

    def __init__(
        self,
        model: PreTrainedModel,
        source: Shape,
        shape: Shape,
        heads: tuple[list[int], list[int]],
        new: Tensor,
        seed: int,
    ) -> None:
        """`heads`: where the source's lie; `new`: of the device and dtype to make."""
        self._weights, self._new = model.state_dict(), new
        self._source, self._shape = source, shape
        self._std = float(model.config.initializer_range)
        self._random = torch.Generator(new.device).manual_seed(seed)
        places, kv_of = heads
        self._hidden, self._vocab = self._first(source.hidden), self._first(source.vocab)
        self._units, self._one = self._first(source.intermediate), self._first(source.head_dim)
        self._queries = self._per_head(places, range(source.heads))
        self._keys = self._per_head(range(len(kv_of)), kv_of)
        rows = torch.arange(len(kv_of) * shape.head_dim, device=new.device)
        self._still = rows[~torch.isin(rows, self._keys.to)]
        # Norms divide by a mean over more dimensions; attention, by the root of a larger head_dim.
        self._shrink = math.sqrt(source.hidden / shape.hidden)
        self._query_scale, self._key_scale = math.sqrt(shape.head_dim / source.head_dim), 1.0
        if isinstance(model, Qwen3ForCausalLM):  # its norms of heads have the same eps, now smaller
            self._query_scale = self._key_scale = self._shrink

    def weight(self, name: str, meta: Tensor) -> Tensor:
        """The weight or bias of this name in the wide model, of `meta`'s shape."""
        kind = name.split(".")[-2]
        axes, spare, scale = self._rule(kind)
        made = self._new.new_zeros(meta.shape)
        if spare:
            made.normal_(0, self._std, generator=self._random)
        if name not in self._weights:
            return made  # of a spare layer
        live = self._weights[name].to(self._new.device, torch.float32)
        for axis in range(meta.ndim):  # a bias has the rows of its weight
            live = live.index_select(axis, axes[axis].of)
        live = (live * scale).to(self._new.dtype)
        if kind == "k_proj":  # new dimensions of live keys meet random queries
            made[self._still] = 0
        made[axes[0].to if meta.ndim == 1 else (axes[0].to[:, None], axes[1].to)] = live
        if kind in ("embed_tokens", "lm_head"):
            made[self._source.vocab :, : self._source.hidden] = live.mean(0, dtype=torch.float32).to(live)
        return made

    def _rule(self, kind: str) -> tuple[tuple[Axis, ...], bool, float]:
        """Of a kind of weight: its axes, whether what is new in it is random or 0, and a factor."""
        hidden, queries, keys, units = self._hidden, self._queries, self._keys, self._units
        return {
            "embed_tokens": ((self._vocab, hidden), False, 1.0),
            "lm_head": ((self._vocab, hidden), True, 1.0),
            "q_proj": ((queries, hidden), True, self._query_scale),
            "k_proj": ((keys, hidden), True, self._key_scale),
            "v_proj": ((keys, hidden), True, 1.0),
            "o_proj": ((hidden, queries), False, 1.0),
            "gate_proj": ((units, hidden), True, 1.0),
            "up_proj": ((units, hidden), True, 1.0),
            "down_proj": ((hidden, units), False, 1.0),
            "q_norm": ((self._one,), True, 1.0),
            "k_norm": ((self._one,), True, 1.0),
        }.get(kind, ((hidden,), True, self._shrink))

    def _first(self, count: int) -> Axis:
        at = torch.arange(count, device=self._new.device)
        return Axis(at, at)

    def _per_head(self, to: Seq[int], of: Seq[int]) -> Axis:
        """Source heads `of`, whole, at the heads `to`."""
        dim, wide = self._source.head_dim, self._shape.head_dim
        new = torch.tensor(list(to))[:, None] * wide + _dims(dim, wide)
        old = torch.tensor(list(of))[:, None] * dim + torch.arange(dim)
        return Axis(new.flatten().to(self._new.device), old.flatten().to(self._new.device))
