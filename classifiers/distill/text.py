"""The generated text on disk and as training batches."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from classifiers.distill.generate import FRESH, SAMPLED, Wave


def wave_file(directory: Path, number: int) -> Path:
    return directory / f"text-{number:05d}.safetensors"


def save_wave(directory: Path, number: int, wave: Wave) -> None:
    """Whole or not at all, so that a killed run resumes at the next wave."""
    part = directory / ".text.part"
    save_file({"tokens": wave.tokens, "flags": wave.flags}, part)
    part.rename(wave_file(directory, number))


class Text:
    """All waves: `tokens` int32[R, L], `flags` uint8[R, L], on `device`."""

    def __init__(self, directory: Path, waves: int, device: torch.device) -> None:
        files = [load_file(wave_file(directory, i)) for i in range(waves)]
        self.tokens = torch.cat([each["tokens"] for each in files]).to(device)
        self.flags = torch.cat([each["flags"] for each in files]).to(device)
        self._epoch, self._order = -1, torch.empty(0)

    def answered(self) -> int:
        """Positions whose next token is the target's own answer."""
        return int((self.flags & SAMPLED).bool()[:, :-1].sum())

    def frequent(self, count: int, vocab: int, always: tuple[int, ...]) -> Tensor:
        """int64[count], ascending: the most frequent tokens of the answers, `always` among them."""
        follows = (self.flags[:, :-1] & SAMPLED).bool()
        counts = torch.bincount(self.tokens[:, 1:][follows].long().flatten(), minlength=vocab)[:vocab]
        counts[torch.tensor(always, dtype=torch.int64, device=counts.device)] = counts.max() + 1
        return counts.argsort(descending=True, stable=True)[:count].sort().values.cpu()

    def covered(self, ids: Tensor, vocab: int) -> float:
        """The share of answer tokens that are among `ids`."""
        known = torch.zeros(vocab, dtype=torch.bool, device=self.tokens.device)
        known[ids.to(known.device)] = True
        follows = (self.flags[:, :-1] & SAMPLED).bool()
        return float(known[self.tokens[:, 1:][follows].long()].float().mean())

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """int64[rows]: the rows of a step. Every row is used once before any is used again."""
        per_epoch = max(1, len(self.tokens) // rows)
        epoch, at = divmod(step, per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.tokens), generator=generator)
            self._order = order.repeat(-(-rows // len(order))).to(self.tokens.device)
            self._epoch = epoch
        return self._order[at * rows : (at + 1) * rows]


def layout(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Positions int64[B, L] and mask bool[B, 1, L, L] (True where attended) of documents in rows."""
    columns = torch.arange(flags.shape[1], device=flags.device)
    starts = torch.where((flags & FRESH).bool(), columns, 0).cummax(1).values
    mask = (starts[:, :, None] == starts[:, None, :]) & (columns[:, None] >= columns)
    return columns - starts, mask[:, None]
