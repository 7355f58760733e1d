"""Passes of the fused runner on random models of the 7B and the 0.5B shape, against what memory allows."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from draft_step import ENDLESS, draft_step
from shapes import random_model

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.fused import FusedRunner
from engine.models.runner import Batch, Chunk
from engine.parts import assemble

BLOCK, CONTEXT = 16, 1024
PASSES = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (4, 1), (16, 1), (4, 4), (8, 5), (32, 1), (32, 5), (64, 1))
"""(rows, tokens of each row)."""


def device_seconds(run: Callable[[], object], calls: int = 10, repeat: int = 7) -> tuple[float, float]:
    """Median seconds of a call on the device, and the spread of the medians' rounds; queued back to back."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / calls)
    return median(found), max(found) - min(found)


def bandwidth() -> float:
    """Bytes a second of reading memory: a sum over 4 GiB."""
    data = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    return data.nbytes / device_seconds(data.sum)[0]


def matrix_rate() -> float:
    """Operations a second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return float(2 * 8192**3 / device_seconds(lambda: a @ b)[0])


def weight_bytes(runner: FusedRunner) -> int:
    """What a pass must read of the weights: all but the embedding."""
    d = runner.decoder
    parts = [m for layer in d.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    head = getattr(d.head, "linear", d.head)
    return sum(part.nbytes for part in parts) + int(head.weight.nbytes)


def kv_bytes(runner: FusedRunner, context: int) -> int:
    return sum(shape.width for shape in runner.shapes.values()) * context * runner.dtype.itemsize


def batch(rows: int, tokens: int, context: int) -> Batch:
    """Rows of `context` positions before their `tokens`; all read the same blocks but their last."""
    shared = list(range(context // BLOCK))
    chunks = []
    for row in range(rows):
        own = [context // BLOCK + 5 * row + i for i in range(5)]
        chunks.append(Chunk([7 + row] * tokens, context, [*shared, *own], tokens))
    return Batch.pack(chunks, BLOCK)


def passes(name: str, read: float, rate: float) -> dict[str, Any]:
    """Decoding, verification, long contexts and prefill of one shape; seconds."""
    runner = FusedRunner(random_model(name), BLOCK)
    runner.allocate(2600)
    assert runner._pool is not None
    for pool in (runner._pool.keys, runner._pool.values):
        for tensor in pool.values():
            tensor.normal_()
    floor = weight_bytes(runner) / read
    found: dict[str, Any] = {
        "weight_bytes": weight_bytes(runner),
        "floor": floor,
        "passes": [],
        "contexts": [],
    }
    for rows, tokens in PASSES:
        made = batch(rows, tokens, CONTEXT)
        seconds, spread = device_seconds(lambda made=made: runner.forward(made))
        found["passes"].append({"rows": rows, "tokens": tokens, "seconds": seconds, "spread": spread})
    one = found["passes"][0]["seconds"]
    for context in (8192, 32768):
        made = batch(1, 1, context)
        seconds, spread = device_seconds(lambda made=made: runner.forward(made))
        more = (kv_bytes(runner, context) - kv_bytes(runner, CONTEXT)) / read
        share = more / (seconds - one) if seconds > one else 1.0
        found["contexts"].append(
            {"context": context, "seconds": seconds, "spread": spread, "of_kv_floor": share}
        )
    made = Batch.pack([Chunk([5] * 2048, 0, list(range(128)), 1)], BLOCK)
    seconds, _ = device_seconds(lambda: runner.forward(made), calls=2)
    d = runner.decoder
    weights = sum(m.numel() for each in d.layers for m in (each.qkv, each.out, each.gate_up, each.down))
    found["prefill"] = {
        "tokens": 2048,
        "seconds": seconds,
        "of_matrix_rate": 2 * 2048 * weights / seconds / rate,
    }
    return found


def random_draft_step() -> dict[str, float]:
    """The draft step of the 0.5B shape; its target is itself, since only the draft is timed."""
    model = random_model("0.5b")
    runner = FusedRunner(model, BLOCK)
    runner.allocate(512)
    config = EngineConfig(target="t", draft="d", policy="static", max_num_seqs=1)
    parts = assemble(
        config, runner, runner, blocks=512, max_model_len=4096, vocab=runner.vocab_size, eos_ids=[1]
    )
    return draft_step(Engine(config, parts), "confidence", ENDLESS, context=CONTEXT)
