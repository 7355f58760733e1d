"""What the engine's passes cost, measured before the first request."""

from __future__ import annotations

import copy
import time

from engine.models.runner import Batch, Chunk, Runner
from engine.parts import Parts
from engine.speculation.costs import Costs, EngineCosts
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.tree import rules

_VERIFY = (
    *((1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (4, 4), (4, 16), (4, 32), (8, 8), (8, 32)),
    *((16, 16), (16, 64), (16, 128), (32, 32), (32, 96), (32, 192), (64, 64), (64, 192), (64, 384)),
)
_DRAFT = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))
_STREAMED = ((1, 1), (1, 32), (1, 192))
"""Of an offloaded target, whose passes take seconds, all alike."""
_ON_A_CPU = 16
"""Tokens of the largest pass that is measured there, where each takes long."""


def measured(parts: Parts, rows: int) -> EngineCosts:
    """Costs of the sizes up to `rows` rows that fit the pool, after little context.

    Only while nothing runs: it writes KV.
    """
    found = EngineCosts()
    sizes, repeat = (_STREAMED, 1) if getattr(parts.target, "streamed", False) else (_VERIFY, 5)
    _measure(found.verify, parts.target, parts, rows, sizes, repeat)
    drafter = parts.drafters.get("model")
    if isinstance(drafter, ModelDrafter):
        _measure(found.drafts["model"], drafter.runner, parts, rows, _DRAFT)
        for name in rules():  # a layer of a tree is a pass over as many tokens
            found.drafts[name] = copy.deepcopy(found.drafts["model"])
    return found


def _measure(
    costs: Costs,
    runner: Runner,
    parts: Parts,
    most: int,
    sizes: tuple[tuple[int, int], ...],
    repeat: int = 5,
) -> None:
    blocks, slow = parts.blocks, runner.device.type == "cpu"

    def run(rows: int, tokens: int) -> float:
        each = tokens // rows
        need = -(-each // blocks.block_size)
        tables = [list(range(row * need, (row + 1) * need)) for row in range(rows)]
        chunks = [Chunk([0] * each, 0, table, each) for table in tables]
        begin = time.perf_counter()
        logits = runner.forward(Batch.pack(chunks, blocks.block_size))
        float(logits[0, 0])  # waits for it
        return time.perf_counter() - begin

    size = blocks.block_size
    fit = [(r, t) for r, t in sizes if r <= most and r * -(-(t // r) // size) <= blocks.num_blocks]
    if slow:
        fit = [(r, t) for r, t in fit if t <= _ON_A_CPU]
    costs.measure(run, fit, repeat=min(repeat, 2) if slow else repeat)
