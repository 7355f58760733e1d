"""What runs a model over the paged KV: the batch it takes and the interface it has."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """What the tokens of a chunk attend where they are not a chain: nodes of a tree.

    Slot is not position: siblings lie one behind the other and have one position.
    """

    trunk: int  # where the tree begins: KV in slots below may be attended by all
    positions: Seq[int]  # by token
    sees: Seq[int]  # by token: it attends the slots below this one
    masks: Seq[int]  # by token: and slot trunk + i if bit i is set, for i below 64


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one row. `start`: the KV length before, and a chain's first position."""

    tokens: Seq[int]
    start: int
    blocks: Seq[int]  # the row's block table, long enough for start + len(tokens)
    logits: int = 1  # how many of the last tokens need logits; 0 for none
    branches: Branches | None = None


@dataclass(frozen=True)
class Inputs:
    """What a model reads of a batch, on its device."""

    ids: Tensor  # int64[N]
    positions: Tensor  # int64[N]
    slots: Tensor  # int64[N], where the KV pool keeps each token: block * block_size + offset
    logits_at: Tensor  # int64[M], indices into N


@dataclass(frozen=True)
class Batch:
    """B ragged rows packed to N tokens; M of the tokens give logits."""

    ids: list[int]  # [N]
    logits_at: list[int]  # [M], indices into N
    query_lens: list[int]  # [B]
    context_lens: list[int]  # [B], KV length after this pass
    block_tables: list[Seq[int]]  # [B][blocks]
    block_size: int
    branches: list[Branches | None]  # [B]

    @classmethod
    def pack(cls, chunks: Seq[Chunk], block_size: int) -> Batch:
        ids: list[int] = []
        logits_at: list[int] = []
        for chunk in chunks:
            ids.extend(chunk.tokens)
            logits_at.extend(range(len(ids) - chunk.logits, len(ids)))
        return cls(
            ids=ids,
            logits_at=logits_at,
            query_lens=[len(chunk.tokens) for chunk in chunks],
            context_lens=[chunk.start + len(chunk.tokens) for chunk in chunks],
            block_tables=[chunk.blocks for chunk in chunks],
            block_size=block_size,
            branches=[chunk.branches for chunk in chunks],
        )

    @property
    def branched(self) -> bool:
        """Whether any row is more than a chain."""
        return any(each is not None for each in self.branches)

    @property
    def starts(self) -> list[int]:
        """[B], KV length before this pass."""
        return [context - query for query, context in zip(self.query_lens, self.context_lens, strict=True)]

    def places(self) -> tuple[list[int], list[int]]:
        """Positions and slots [N]."""
        size = self.block_size
        positions: list[int] = []
        slots: list[int] = []
        rows = zip(self.starts, self.context_lens, self.block_tables, self.branches, strict=True)
        for start, context, blocks, branches in rows:
            positions.extend(range(start, context) if branches is None else branches.positions)
            slots.extend(blocks[p // size] * size + p % size for p in range(start, context))
        return positions, slots

    def sights(self) -> tuple[list[int], list[int], list[int]]:
        """`trunk` by row; `sees` and `masks` (int64) [N], chains told as trees are: see `Branches`."""
        trunks: list[int] = []
        sees: list[int] = []
        masks: list[int] = []
        for start, context, branches in zip(self.starts, self.context_lens, self.branches, strict=True):
            trunks.append(start if branches is None else branches.trunk)
            sees.extend(range(start + 1, context + 1) if branches is None else branches.sees)
            masks.extend([0] * (context - start) if branches is None else map(_signed, branches.masks))
        return trunks, sees, masks

    def padded_tables(self) -> list[int]:
        """[B * width], row by row, each filled up with block 0 to the width of the longest."""
        width = max(map(len, self.block_tables))
        return [block for row in self.block_tables for block in (*row, *[0] * (width - len(row)))]

    def on_device(self, device: torch.device) -> Inputs:
        """By one copy."""
        positions, slots = self.places()
        packed = torch.tensor([*self.ids, *positions, *slots, *self.logits_at], dtype=torch.int64)
        packed = packed.to(device, non_blocking=True)
        return Inputs(*packed.split_with_sizes([len(self.ids)] * 3 + [len(self.logits_at)]))


def _signed(word: int) -> int:
    """64 bits as an int64."""
    return word - (1 << 64) if word >> 63 else word


class Runner(Protocol):
    """A causal language model with its own KV pool, addressed by block ids."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def context(self) -> int:
        """The most tokens a row may have."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def hidden(self) -> Tensor | None:
        """[M, H]: what the last pass's logits were made of, until the next pass; None if `hidden_size` is."""
        ...

    @property
    def hidden_size(self) -> int | None:
        """Width of `hidden`, or None where the model does not show it."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Writes the batch's KV and returns logits [M, vocab_size]."""
        ...

    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies the KV of slots (from, to), all read before any is written."""
        ...

    def warm(self, rows: int, longest: int) -> None:
        """Readies what passes over up to `rows` rows of up to `longest` tokens will need."""
        ...
