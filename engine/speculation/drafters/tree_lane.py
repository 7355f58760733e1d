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
        return self._told(self._wait()[:total])

    @torch.inference_mode()
    def behind(self, logits: Tensor, rows: Seq[LaneRow], noisy: bool) -> list[list[tuple[int, float]]]:
        """`followers` after a pass that gave logits float[M, >= vocab] of the rows' last tokens, `len(noise)`
        of each."""
        states = torch.tensor([row.state for row in rows for _ in row.noise], device=logits.device)
        keys = torch.tensor([key for row in rows for key in row.noise], device=logits.device)
        heat = torch.tensor([row.heat for row in rows for _ in row.noise], device=logits.device)
        return self._told(self._likeliest(logits, states, keys, heat, noisy))

    def _told(self, found: Tensor) -> list[list[tuple[int, float]]]:
        most = self._most
        return [
            [(int(t), p) for t, p in zip(row[:most], row[most:], strict=True) if p > 0]
            for row in found.tolist()
        ]

    def _follow(self, logits: Tensor, size: int, noisy: bool) -> None:
        states, keys, heat = self._states[:size], self._keys[:size], self._heat[:size]
        self.answer[:size] = self._likeliest(logits[:size], states, keys, heat, noisy)

    def _likeliest(self, logits: Tensor, states: Tensor, keys: Tensor, heat: Tensor, noisy: bool) -> Tensor:
        """float32[M, 2 * most]: ids, then probabilities."""
        scores = logits[:, : self._vocab].float() / heat[:, None].clamp(min=1e-3)
        if noisy:  # greedy rows have no state
            scores = torch.where((states != 0)[:, None], scores + gumbel(keys, self._lanes).float(), scores)
        best, ids = scores.topk(self._most, dim=-1)
        return torch.cat([ids.float(), (best - scores.logsumexp(-1, keepdim=True)).exp()], 1)
