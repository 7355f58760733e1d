"""The KV tensors of one model, by layer, addressed by slot (block * block_size + offset)."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """KV of one attention layer: heads and widths of a key and of a value."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers kept for one token."""
        return self.heads * (self.key_dim + self.value_dim)


class KVPool:
    """`keys[layer]` [slots, heads, key_dim], `values[layer]` [slots, heads, value_dim].

    Zeros at first, so that a slot that was never written holds no NaN.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        slots = blocks * block_size
        self.blocks, self.block_size = blocks, block_size
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._parts: list[Tensor] = []  # [any, slots, heads, dim]: all of them, in as few tensors as can be
        first = next(iter(shapes.values()))
        if device.type != "cpu" and {*shapes.values()} == {
            LayerShape(first.heads, first.key_dim, first.key_dim)
        }:
            whole = torch.zeros(
                2 * len(shapes), slots, first.heads, first.key_dim, dtype=dtype, device=device
            )
            self._parts = [whole]
            self.keys, self.values = (dict(zip(shapes, half, strict=True)) for half in whole.chunk(2))
            return
        for layer, shape in shapes.items():
            self.keys[layer] = _zeros((slots, shape.heads, shape.key_dim), dtype, device)
            self.values[layer] = _zeros((slots, shape.heads, shape.value_dim), dtype, device)
            self._parts += [self.keys[layer][None], self.values[layer][None]]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys [N, heads, key_dim], values [N, heads, value_dim] to slots int64[N]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies slots (from, to) in every layer, which may overlap: all are read before any is written."""
        at, to = torch.tensor(pairs, dtype=torch.int64).to(self._parts[0].device).unbind(1)
        for part in self._parts:
            part.index_copy_(1, to, part.index_select(1, at))


def moves(blocks: Seq[int], base: int, places: Seq[int], size: int) -> list[tuple[int, int]]:
    """Slots (from, to), in a row's blocks of `size`: what lies at base + places[i] is to come to base + i."""

    def slot(at: int) -> int:
        return blocks[at // size] * size + at % size

    return [(slot(base + at), slot(base + to)) for to, at in enumerate(places) if at != to]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the system's own zero pages, which take memory only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
    )


def bytes_per_block(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(shape.width for shape in shapes.values()) * block_size * dtype.itemsize
