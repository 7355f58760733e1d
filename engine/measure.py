"""What the engine's passes cost, measured before the first request."""

from __future__ import annotations

import time

from engine.models.runner import Batch, Chunk, Runner
from engine.parts import Parts
from engine.speculation.costs import Costs, EngineCosts
from engine.speculation.drafters.model import ModelDrafter

_VERIFY = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (4, 4), (4, 16), (8, 8), (16, 16), (32, 32))
_DRAFT = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32))


def measured(parts: Parts) -> EngineCosts:
    """Costs of the sizes that fit the pool, after little context. Only while nothing runs: it writes KV."""
    found = EngineCosts()
    _measure(found.verify, parts.target, parts, _VERIFY)
    drafter = parts.drafters.get("model")
    if isinstance(drafter, ModelDrafter):
        _measure(found.drafts["model"], drafter.runner, parts, _DRAFT)
    return found


def _measure(costs: Costs, runner: Runner, parts: Parts, sizes: tuple[tuple[int, int], ...]) -> None:
    blocks = parts.blocks

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
    costs.measure(run, [(r, t) for r, t in sizes if r * -(-(t // r) // size) <= blocks.num_blocks])
