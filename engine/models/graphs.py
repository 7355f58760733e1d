"""CUDA graphs of the fused runner's passes over more tokens than the decoding kernel takes.

Launched one by one, the three hundred kernels of a pass keep the host busy for as long as the
device. A graph is captured at the first pass of its size (rows, tokens, longest row) and replayed
with inputs copied to where it reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from engine.models.kernels.attention import Places
from engine.models.runner import Batch

_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_ROWS = (1, 4, 16, 32, 64)
_LONGEST = (1, 8, 32)
"""Few sizes, since a capture takes a tenth of a second; but attention splits the context by the rows that
a graph is made for, and few rows need it split."""

SPARE = 2 * 2**30  # bytes that capturing ahead leaves free
log = logging.getLogger(__name__)

Pass = Callable[[Tensor, Tensor, Tensor, Places], tuple[Tensor, Tensor]]
"""(ids, positions, slots, places) -> logits [tokens, vocab], the head's input [tokens, hidden]."""


def bucket(n: int, sizes: Seq[int] = (1, 2, 4, 8, 16, 32, 64)) -> int:
    """The smallest size that holds n."""
    return next(size for size in sizes if size >= n)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    words: Tensor  # int32, the inputs where the graph reads them
    host: Tensor  # pinned, the same
    copied: torch.cuda.Event


class PassGraphs:
    """Graphs of `run` for batches of a decoding step; `width`: blocks of the longest row."""

    def __init__(self, run: Pass, spare_slot: int, width: int, device: torch.device) -> None:
        self._run, self._spare_slot, self._width, self._device = run, spare_slot, width, device
        self._longest = _LONGEST[-1]  # tokens of a row that graphs are made for
        self._captured: dict[tuple[int, int, int], _Captured] = {}
        self._pool: Any = None  # the memory that the graphs share
        self._results: tuple[Tensor, Tensor] | None = None  # of whichever graph ran last: one memory for all

    def takes(self, batch: Batch) -> bool:
        """Whether it has the size of a decoding step; prompts are as many sizes as there are prompts."""
        rows, longest = len(batch.query_lens), max(batch.query_lens)
        return sum(batch.query_lens) <= _TOKENS[-1] and rows <= _ROWS[-1] and longest <= self._longest

    def warm(self, rows: int, longest: int) -> None:
        """Captures what decoding up to `rows` rows of up to `longest` tokens will need.

        Longer rows are prompts from then on: a graph for each size would be captured while they wait.
        """
        self._longest, least = bucket(min(longest, _LONGEST[-1]), _LONGEST), 0
        for most in _LONGEST:
            likely = min(most, longest)
            for size in (size for size in _ROWS if size < 2 * rows and least < longest):
                if torch.cuda.mem_get_info(self._device)[0] < SPARE:
                    log.warning("little memory is left: graphs are captured when they are first needed")
                    return
                for tokens in _TOKENS:
                    if size + least <= tokens <= max(bucket(min(size * likely, _TOKENS[-1]), _TOKENS), 16):
                        self._found(size, tokens, most)
            least = most

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and the head's input of the batch's tokens, valid until the next pass."""
        rows, total = len(batch.query_lens), sum(batch.query_lens)
        key = bucket(rows, _ROWS), bucket(total, _TOKENS), bucket(max(batch.query_lens), _LONGEST)
        found = self._found(*key)
        found.copied.synchronize()  # what was copied last must have left the host's buffer
        self._fill(found.host, batch, *key[:2])
        found.words.copy_(found.host, non_blocking=True)
        found.copied.record()
        found.graph.replay()
        assert self._results is not None
        return self._results[0][:total], self._results[1][:total]

    def _found(self, rows: int, tokens: int, longest: int) -> _Captured:
        key = rows, tokens, longest
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        return self._captured[key]

    def _fill(self, host: Tensor, batch: Batch, rows: int, tokens: int) -> None:
        words = host.numpy()
        n, total = len(batch.query_lens), sum(batch.query_lens)
        by_token = words[: 3 * tokens].reshape(3, tokens)
        by_row = words[3 * tokens : 3 * (tokens + rows)].reshape(3, rows)
        tables = words[3 * (tokens + rows) :].reshape(rows, self._width)
        by_token[:2, total:], by_token[2, total:] = 0, self._spare_slot
        by_row[2, n:] = 0
        by_token[0, :total] = batch.ids
        by_token[1, :total], by_token[2, :total] = batch.places()
        by_row[0, :n], by_row[2, :n] = batch.starts, batch.query_lens
        by_row[1, :n] = [0, *accumulate(batch.query_lens[:-1])]
        for row, blocks in enumerate(batch.block_tables):
            tables[row, : len(blocks)] = blocks

    def _capture(self, rows: int, tokens: int, longest: int) -> _Captured:
        size = 3 * (tokens + rows) + rows * self._width
        words = torch.zeros(size, dtype=torch.int32, device=self._device)
        words[2 * tokens : 3 * tokens] = self._spare_slot
        by_row = words[3 * tokens : 3 * (tokens + rows)].view(3, rows)
        places = Places(
            by_row[0], by_row[1], by_row[2], words[3 * (tokens + rows) :].view(rows, self._width), longest
        )
        inputs = (*words[: 3 * tokens].view(3, tokens), places)
        results = self._run(*inputs)  # compiles what is not compiled yet
        if self._results is None:
            logits, hidden = (each.new_empty(_TOKENS[-1], each.shape[1]) for each in results)
            self._results = logits, hidden
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for kept, result in zip(self._results, self._run(*inputs), strict=True):
                kept[:tokens].copy_(result)
        self._pool = graph.pool()
        host = torch.zeros(size, dtype=torch.int32).pin_memory()
        return _Captured(graph, words, host, torch.cuda.Event())
