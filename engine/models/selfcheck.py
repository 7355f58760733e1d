"""A runner proves itself at start: a probe through its paged KV must give the model's own logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.runner import Batch, Chunk
from engine.types import CannotLoad

PROBE = 28  # tokens


class UnsupportedModel(CannotLoad):
    """The model needs something that the runner does not do."""


class Checkable(Protocol):
    """What `check` needs of a runner that has no pool yet."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def allocate(self, blocks: int) -> None: ...

    def forward(self, batch: Batch) -> Tensor: ...


def batch_dependence(model: PreTrainedModel) -> str | None:
    """Why one row of a batch could change another's text, or None.

    Rotary frequencies that follow the longest row do; a probe of few tokens would not show it.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return f"{type(model).__name__} has {kind} rotary frequencies, which follow the longest row"
    return None


def probe_ids(vocab_size: int) -> list[int]:
    return [(7 * i + 3) % vocab_size for i in range(PROBE)]


def own_logits(model: PreTrainedModel) -> Tensor:
    """float32[T, V]: the model's own forward over the probe, before anything is changed."""
    ids = torch.tensor([probe_ids(int(model.config.get_text_config().vocab_size))], device=model.device)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def check(runner: Checkable, name: str, block_size: int, expected: Tensor, exact: bool) -> None:
    """Two chunks over scattered blocks, beside another row, must give `expected`; leaves a pool behind.

    `exact`: the runner computes in float32 or better. Raises UnsupportedModel.
    """
    ids = probe_ids(runner.vocab_size)
    runner.allocate(3 * -(-len(ids) // block_size))
    split, last = len(ids) - 8, len(ids) // block_size
    table, other = [2 * i + 1 for i in range(last + 1)], [2 * i for i in range(last + 1)]
    chunks = [Chunk(ids[:split], 0, table, split), Chunk(ids[:8], 0, other, 0)]
    first = runner.forward(Batch.pack(chunks, block_size)).clone()
    chunks = [Chunk(ids[8:10], 8, other, 0), Chunk(ids[split:], split, table, 8)]
    second = runner.forward(Batch.pack(chunks, block_size))
    got = torch.cat([first, second]).float()
    if bool(expected.isnan().any()):
        raise UnsupportedModel(f"{name}: its logits are NaN")
    known = expected > float("-inf")  # a head over a reduced vocabulary says -inf elsewhere
    if not torch.equal(~known, got == float("-inf")):
        raise UnsupportedModel(f"{name}: its logits are -inf elsewhere than its own")
    # By position. Rounding to bf16 alone moves single positions of deep models by half of their logits'
    # spread, but most by a few per cent; a wrong key or position moves all of a chunk by more than that.
    mine, own = (torch.where(known, each, 0.0) for each in (got, expected))
    spread = own - own.sum(-1, keepdim=True) / known.sum(-1, keepdim=True) * known
    off = (mine - own).norm(dim=-1) / spread.norm(dim=-1).clamp(min=1e-3)
    worst = off.max() if exact else off.quantile(0.75)
    tolerance = 1e-3 if exact else 0.3
    if not bool(worst <= tolerance):
        raise UnsupportedModel(f"{name} does not run over a paged KV: logits {float(worst):.0%} off its own")
