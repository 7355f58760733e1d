"""Passes of at most 16 tokens through the decoding kernel with what follows them, as one graph replay.

Launched piece by piece, a pass costs the host 0.3 ms and more in which the device has nothing to do; here the
host writes the batch into one pinned buffer, replays a graph (copy, pass, what the lane makes of it, answer),
and reads the answer when it is there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kv.blocks import BlockTable
from engine.long_work import long_work
from engine.models.decode_data import META, MOST, write_meta
from engine.models.fused import FusedRunner
from engine.models.graphs import bucket
from engine.models.runner import Branches
from engine.sequence import Sequence


@dataclass
class LaneRow:
    """What a row has in the pass. `noise`: by token the key of its noise, int64; `heat`: the temperature."""

    seq: Sequence
    start: int  # KV length before
    tokens: Seq[int]
    branches: Branches | None
    state: int
    noise: Seq[int]
    heat: float


class PassLane:
    """`vocab`: ids at or above it are padding. `answer`, on the device, is what the pass begun last gave."""

    def __init__(self, runner: FusedRunner, vocab: int, answer: Tensor) -> None:
        device = runner.device
        self._runner, self._vocab = runner, vocab
        # META, then by token: states and keys of the noise int64, temperatures float32.
        words = META + 5 * MOST
        self._host = torch.zeros(words, dtype=torch.int32).pin_memory()
        self._words = torch.zeros(words, dtype=torch.int32, device=device)
        self._to = self._host.numpy()
        wide = self._words[META : META + 4 * MOST].view(torch.int64).view(2, MOST)
        self._states, self._keys = wide[0], wide[1]
        self._heat = self._words[META + 4 * MOST :].view(torch.float32)
        here = self._to[META : META + 4 * MOST].view(np.int64).reshape(2, MOST)
        self._states_to, self._keys_to = here[0], here[1]
        self._heat_to = self._to[META + 4 * MOST :].view(np.float32)
        width = -(-runner.context // runner.block_size) + 1
        self._tables = torch.zeros(MOST, width, dtype=torch.int32, device=device)
        self._tables_host = torch.zeros(MOST, width, dtype=torch.int32).pin_memory()
        self._lines = self._tables_host.numpy()
        self._held: list[tuple[BlockTable | None, int]] = [(None, 0)] * MOST  # what each line shows
        self.answer = answer
        self._answer_host = torch.zeros_like(answer, device="cpu").pin_memory()
        self._done = torch.cuda.Event()
        self._captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @abstractmethod
    def _follow(self, logits: Tensor, size: int, noisy: bool) -> None:
        """What a graph does with the pass's logits float[size, >= vocab]: fills `answer`."""
        ...

    @torch.inference_mode()
    def warm(self) -> None:
        """Captures the graphs of all sizes."""
        for size in (1, 2, 4, 8, 16):
            if size <= self._runner.decodes:
                self._graph(size, False)

    def _begin(self, rows: Seq[LaneRow], noisy: bool = False) -> Tensor:
        """Queues the pass; logits float[tokens, vocab], valid until the next one."""
        total = sum(len(row.tokens) for row in rows)
        graph, logits = self._graph(bucket(total), noisy)
        self._done.synchronize()  # the host's buffers may still be read
        self._fill(rows)
        graph.replay()
        self._done.record()
        return logits[:total]

    def _wait(self) -> Tensor:
        """The answer, on the host."""
        self._done.synchronize()
        return self._answer_host

    def _fill(self, rows: Seq[LaneRow]) -> None:
        starts, tokens = [row.start for row in rows], [row.tokens for row in rows]
        write_meta(self._to, starts, tokens, [row.branches for row in rows])
        at, changed = 0, 0
        for i, row in enumerate(rows):
            end = at + len(row.tokens)
            self._states_to[at:end], self._keys_to[at:end] = row.state, row.noise
            self._heat_to[at:end] = row.heat
            at = end
            blocks = row.seq.blocks
            table, shown = self._held[i]
            if table is not row.seq.table:
                shown = 0
            if shown != len(blocks):  # a table only grows
                self._lines[i, shown : len(blocks)] = blocks[shown:]
                self._held[i], changed = (row.seq.table, len(blocks)), i + 1
        if changed:
            self._tables[:changed].copy_(self._tables_host[:changed], non_blocking=True)

    def _graph(self, size: int, noisy: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        key = size, noisy
        if key not in self._captured:
            self._captured[key] = self._capture(size, noisy)
        return self._captured[key]

    @long_work()
    def _capture(self, size: int, noisy: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._to[:META] = 0
        self._step(size, noisy)  # compiles; a pass of no tokens
        torch.cuda.synchronize(self._runner.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(size, noisy)
        return graph, logits[:, : self._vocab]

    def _step(self, size: int, noisy: bool) -> Tensor:
        """What a graph captures, for at most `size` tokens."""
        self._words.copy_(self._host, non_blocking=True)
        logits = self._runner.decode(self._words[:META], self._tables, size)
        self._follow(logits, size, noisy)
        self._answer_host.copy_(self.answer, non_blocking=True)
        return logits
