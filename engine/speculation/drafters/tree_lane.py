"""Short passes of a tree's draft on a GPU, with the followers of every token: one graph replay, one wait."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.models.decode_data import MOST, sees_all
from engine.models.fused import FusedRunner
from engine.models.runner import Chunk
from engine.speculation.noise import gumbel, lanes_of
from engine.speculation.pass_lane import LaneRow, PassLane
from engine.speculation.tree import MOST_CHILDREN


class TreeLane(PassLane):
    """`answer` float32[16, 64], by token: ids of its likeliest followers, and their probabilities."""

    def __init__(self, runner: FusedRunner, vocab: int) -> None:
        self._most = min(MOST_CHILDREN, vocab)
        super().__init__(runner, vocab, torch.zeros(MOST, 2 * self._most, device=runner.device))
        self._lanes = lanes_of(vocab, runner.device)

    def takes(self, chunks: Seq[Chunk]) -> bool:
        """Whether the decoding kernel can: they are short, and branch among their own tokens alone."""
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        return tokens <= self._runner.decodes and sees_all(
            [chunk.branches for chunk in chunks], [chunk.start for chunk in chunks]
        )

    @torch.inference_mode()
    def followers(self, rows: Seq[LaneRow], noisy: bool) -> list[list[tuple[int, float]]]:
        """By token of the pass: ids and probabilities, as `noise.first` gives them. `noisy`: any row is."""
        total = sum(len(row.tokens) for row in rows)
        self._begin(rows, noisy)
        told = self._wait()[:total].tolist()
        most = self._most
        return [[(int(t), p) for t, p in zip(row[:most], row[most:], strict=True) if p > 0] for row in told]

    def _follow(self, logits: Tensor, size: int, noisy: bool) -> None:
        scores = logits[:size, : self._vocab].float() / self._heat[:size, None].clamp(min=1e-3)
        if noisy:  # greedy rows have no state
            noise = gumbel(self._keys[:size], self._lanes).float()
            scores = torch.where((self._states[:size] != 0)[:, None], scores + noise, scores)
        best, ids = scores.topk(self._most, dim=-1)
        self.answer[:size, : self._most] = ids
        self.answer[:size, self._most :] = (best - scores.logsumexp(-1, keepdim=True)).exp()
