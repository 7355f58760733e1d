"""A target of a large shape, made in memory from a small checkpoint, and a draft: one engine.

What of the target does not fit on the GPU is offloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from widen import Shape, hollow, shape_of
from widen_weights import Filler

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import fingerprint, load
from engine.models.fused import FusedRunner
from engine.models.offload import CudaMover, LayerStream, PlainMover, Slot
from engine.models.pinned import pinned
from engine.models.placing import Placement, check_host, place, plan
from engine.offloading import host_memory
from engine.pairing import heads_of, load_draft_model, named_heads
from engine.parts import _runner, assemble

_CHUNK = 2**30
Say = Callable[[str], None]


def bandwidth(device: torch.device, repeat: int = 7) -> float:
    """Bytes a second from pinned memory to the device: median of copies of 1 GiB, as layers are copied."""
    source = pinned(_CHUNK, device)
    mover = CudaMover(device) if device.type == "cuda" else PlainMover()
    slot = mover.slot(_CHUNK)
    seconds = [_seconds(lambda: _copy(mover, slot, source), device) for _ in range(repeat)]
    return _CHUNK / median(seconds[1:])


def _copy(mover: CudaMover | PlainMover, slot: Slot, source: torch.Tensor) -> None:
    mover.fill(slot, source)
    mover.await_(slot)
    mover.released(slot)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def engine_of(
    config: EngineConfig, shape: Shape, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[Engine, dict[str, Any]]:
    """The engine, and what was built: shape, placement, bytes and seconds.

    `config.target` is the small checkpoint that is widened to `shape` (its vocabulary is the source's).
    """
    begin, free = time.perf_counter(), host_memory()
    device = load.pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = load.pick_dtype(config.dtype, device)
    source = load.load_model(config.target, dtype=dtype, device="cpu")
    draft_model = load_draft_model(config, source, tokenizer, dtype, device)
    assert draft_model is not None and config.kv_blocks is not None and config.max_model_len is not None
    wide, filler = hollow(source, replace(shape, vocab=0), device, dtype)
    wide.requires_grad_(False)
    placement = plan(wide, device, resident=config.resident_layers, buffers=config.offload_buffers)
    live = shape_of(source.config).layers
    check_host(_distinct(placement, live), free)
    stream = _placed(wide, filler, device, placement, live)
    del source, filler
    if device.type == "cuda":
        torch.cuda.empty_cache()
    built = time.perf_counter() - begin
    say(f"{placement.resident} layers resident, {placement.streamed} streamed; built in {built:.0f} s")
    target, draft = FusedRunner(wide, config.block_size, stream), _runner(config, draft_model, None)
    for runner in (target, draft):
        runner.allocate(config.kv_blocks)
    vocab = min(load.real_vocab_size(tokenizer), int(wide.config.vocab_size))
    pair = {"target": fingerprint.of_model(config.target)}
    pair["draft"] = fingerprint.of_draft(config.draft, config.target, tokenizer) or config.draft
    parts = assemble(
        config,
        target,
        draft,
        blocks=config.kv_blocks,
        max_model_len=config.max_model_len,
        vocab=vocab,
        eos_ids=load.eos_token_ids(wide, tokenizer),
        dtype=str(dtype).removeprefix("torch."),
        heads=heads_of(named_heads(config), pair, draft),
    )
    parts.pair = pair
    engine = Engine(config, parts)
    streamed = 0 if stream is None else stream.streamed_bytes
    return engine, {
        "shape": asdict(shape_of(wide.config)),
        "source_layers": live,
        "spare_layers": "random, dead, all alike; those streamed share one pinned buffer, copied for each",
        "placement": asdict(placement),
        "streamed_bytes": streamed,
        "weight_bytes": sum(p.nbytes for p in wide.parameters()),
        "build_seconds": built,
        "start_seconds": time.perf_counter() - begin - built,
    }


def _distinct(placement: Placement, live: int) -> Placement:
    """What the host must hold: the spare layers once."""
    return replace(placement, streamed=min(placement.streamed, live + 1))


@torch.inference_mode(False)
@torch.no_grad()
def _placed(
    wide: PreTrainedModel, filler: Filler, device: torch.device, placement: Placement, live: int
) -> LayerStream | None:
    """Makes the weights, layer by layer on the device, and leaves them where they belong."""
    core: Any = wide.model

    def fill(module: nn.Module, prefix: str) -> None:
        made = {name: filler.weight(f"{prefix}.{name}", t) for name, t in module.state_dict().items()}
        module.load_state_dict(made, assign=True)

    def ready(index: int) -> None:
        if index <= live:
            fill(core.layers[index], f"model.layers.{index}")
            return
        last = core.layers[index - 1].state_dict()
        if index >= placement.streamed:  # on the device each has its own, as it would
            last = {name: t.to(device, copy=True) for name, t in last.items()}
        core.layers[index].load_state_dict(last, assign=True)

    fill(core.embed_tokens, "model.embed_tokens")
    fill(core.norm, "model.norm")
    fill(wide.lm_head, "lm_head")  # type: ignore[arg-type]
    wide.tie_weights()
    return place(wide, device, placement, ready)
