"""The target's own text, by the million tokens: rows of documents, sampled and greedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from classifiers.distill.decoder import LockstepDecoder
from classifiers.distill.documents import Beginnings

QUESTION_TOKENS = 96  # an invented question is ended after these
QUESTION_TEMPERATURE = 0.9
_WIDTH = 128  # attention reads the cache in steps of so many columns

FRESH, SAMPLED = 1, 2
"""Flags of a column: a document begins here; the next token is the target's own answer."""


@dataclass
class Wave:
    """`tokens` int32[B, L] and `flags` uint8[B, L] on the CPU."""

    tokens: Tensor
    flags: Tensor


class Writer:
    """Continues documents on B rows of L columns; every document is its own context.

    `vocab`: ids at or above it are padding and never sampled. Uses a CUDA graph per width.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        documents: Beginnings,
        *,
        rows: int,
        length: int,
        answer_tokens: int,
        eos_ids: tuple[int, ...],
        vocab: int,
    ) -> None:
        device = model.device
        self._decoder = LockstepDecoder(model, length)
        self._documents, self._answer_tokens, self._vocab = documents, answer_tokens, vocab
        self._eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self._length = length
        width = max(documents.tokens.shape[1], len(documents.answer))
        long, flag = torch.int64, torch.bool

        def state(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self._ids, self._starts, self._age = state(long), state(long), state(long)
        self._queue, self._queued, self._taken = state(long, width), state(long), state(long)
        self._open, self._closing = state(flag), state(flag)
        self._temperature = state(torch.float32)
        self._column = torch.zeros(1, dtype=long, device=device)
        self._next = torch.zeros(1, dtype=long, device=device)  # document to begin
        self.tokens, self.flags = state(torch.int32, length), state(torch.uint8, length)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # memory that the graphs share: they never run at once

    def close(self) -> None:
        self._graphs.clear()
        self._decoder.close()

    @torch.inference_mode()
    def write(self, wave: int, seed: int, progress: Callable[[int], None] = lambda _: None) -> Wave:
        """Wave number `wave`, the same for a seed. `progress` hears of the tokens of each column."""
        torch.manual_seed((seed * 1_000_003 + wave) % 2**63)
        rows = len(self._ids)
        self._column.fill_(-1)
        self._next.fill_(wave * documents_per_wave(rows, self._length) % len(self._documents.lengths))
        self._closing.fill_(True)
        self._begin(torch.zeros_like(self._ids))
        self._closing.fill_(False)
        self._column.zero_()
        for column in range(self._length):
            self._run(min(self._length, (column // _WIDTH + 1) * _WIDTH))
            progress(rows)
        return Wave(self.tokens.to("cpu", copy=True), self.flags.to("cpu", copy=True))

    def _run(self, width: int) -> None:
        if self._ids.device.type != "cuda":
            return self._step(width)
        if width not in self._graphs:
            saved = [each.clone() for each in self._states()]
            self._step(width)  # warm: allocates the cache, builds the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(width)
            self._pool = graph.pool()
            for each, before in zip(self._states(), saved, strict=True):
                each.copy_(before)
            self._graphs[width] = graph
        self._graphs[width].replay()

    def _states(self) -> list[Tensor]:
        return [
            *(self._ids, self._starts, self._age, self._queue, self._queued, self._taken, self._open),
            *(self._closing, self._temperature, self._column, self._next, self.tokens, self.flags),
        ]

    def _step(self, width: int) -> None:
        """One column: read the logits after it, settle every row's next token, move on. All in place."""
        logits = self._decoder(self._ids, self._starts, self._column, width)[:, : self._vocab]
        fresh = (self._starts == self._column).to(torch.uint8) * FRESH
        self.tokens.index_copy_(1, self._column, self._ids[:, None].to(torch.int32))
        forced = self._taken < self._queued
        own = ~forced & ~self._closing
        answer = own & ~self._open
        self.flags.index_copy_(1, self._column, (fresh + answer.to(torch.uint8) * SAMPLED)[:, None])
        choice = self._choose(logits)
        queued = self._queue.gather(1, self._taken.clamp(max=self._queue.shape[1] - 1)[:, None])[:, 0]
        following = torch.where(forced, queued, choice)
        self._taken += forced.long()
        self._age += own.long()
        ended = own & torch.isin(choice, self._eos)
        asked = own & self._open & (ended | (self._age >= QUESTION_TOKENS))
        following = self._force_answer(asked, following)
        self._begin(following)  # rows that were closing
        self._closing.copy_(answer & (ended | (self._age >= self._answer_tokens)))
        self._column += 1

    def _choose(self, logits: Tensor) -> Tensor:
        """int64[B]: argmax(logits + T g), which is a sample at temperature T, and greedy at 0."""
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_().clamp_(min=1e-30).log_()
        temperature = torch.where(self._open, QUESTION_TEMPERATURE, self._temperature)
        return (logits.float() - temperature[:, None] * noise).argmax(-1)

    def _force_answer(self, asked: Tensor, following: Tensor) -> Tensor:
        """Rows whose question is complete get the template up to the answer; its first token comes next."""
        answer = self._documents.answer
        self._queue[:, : len(answer)] = torch.where(asked[:, None], answer, self._queue[:, : len(answer)])
        self._queued.copy_(torch.where(asked, len(answer), self._queued))
        self._taken.copy_(torch.where(asked, 1, self._taken))
        self._age.masked_fill_(asked, 0)
        self._open &= ~asked
        return torch.where(asked, answer[0], following)

    def _begin(self, following: Tensor) -> None:
        """Rows that are closing take the next document; `_ids` becomes every row's next token."""
        documents, closing = self._documents, self._closing
        number = (self._next + closing.long().cumsum(0) - 1) % len(documents.lengths)
        self._next += closing.sum()
        tokens = documents.tokens[number]
        width = tokens.shape[1]
        self._queue[:, :width] = torch.where(closing[:, None], tokens, self._queue[:, :width])
        self._queued.copy_(torch.where(closing, documents.lengths[number], self._queued))
        self._taken.copy_(torch.where(closing, 1, self._taken))
        self._open.copy_(torch.where(closing, documents.open[number], self._open))
        self._temperature.copy_(torch.where(closing, documents.temperature[number], self._temperature))
        self._age.masked_fill_(closing, 0)
        self._starts.copy_(torch.where(closing, self._column + 1, self._starts))
        self._ids.copy_(torch.where(closing, tokens[:, 0], following))


def documents_per_wave(rows: int, length: int) -> int:
    """About how many documents a wave begins: where the next wave takes up the list."""
    return rows * max(1, length // 128)
