"""What runs a model over the paged KV: the batch it takes and the interface it has."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one row. `start`: their first position, which is also the KV length before."""

    tokens: Seq[int]
    start: int
    blocks: Seq[int]  # the row's block table, long enough for start + len(tokens)
    logits: int = 1  # how many of the last tokens need logits; 0 for none


@dataclass(frozen=True)
class Batch:
    """B ragged rows packed to N tokens; M of the tokens give logits."""

    input_ids: Tensor  # int64[N]
    positions: Tensor  # int64[N]
    slots: Tensor  # int64[N], where the KV pool keeps each token: block * block_size + offset
    logits_at: Tensor  # int64[M], indices into N
    query_lens: list[int]  # [B]
    context_lens: list[int]  # [B], KV length after this pass
    block_tables: list[Seq[int]]  # [B][blocks]

    @classmethod
    def pack(cls, chunks: Seq[Chunk], block_size: int, device: torch.device) -> Batch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logits_at: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            ids.extend(chunk.tokens)
            positions.extend(range(chunk.start, end))
            blocks = chunk.blocks
            slots.extend(
                blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)
            )
            logits_at.extend(range(len(ids) - chunk.logits, len(ids)))

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        return cls(
            input_ids=tensor(ids),
            positions=tensor(positions),
            slots=tensor(slots),
            logits_at=tensor(logits_at),
            query_lens=[len(chunk.tokens) for chunk in chunks],
            context_lens=[chunk.start + len(chunk.tokens) for chunk in chunks],
            block_tables=[chunk.blocks for chunk in chunks],
        )


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

    def forward(self, batch: Batch) -> Tensor:
        """Writes the batch's KV and returns logits [M, vocab_size]."""
        ...
