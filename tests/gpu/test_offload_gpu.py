"""Streamed layers on a GPU: copies and computation must not overtake each other, however they are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.fused import FusedRunner
from engine.models.offload import CudaMover, LayerStream, Slot
from engine.models.pinned import pinned
from engine.models.placing import place, plan
from engine.models.runner import Batch, Chunk
from engine.parts import ConfigError, build
from engine.types import GenerateRequest, SamplingParams

pytestmark = pytest.mark.gpu

BLOCK, BLOCKS = 16, 40


class Slow(CudaMover):
    """Copies that come late: behind some milliseconds of spinning."""

    def fill(self, slot: Slot, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(3_000_000)
        super().fill(slot, source)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1003,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1200,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def passes(runner: FusedRunner) -> list[torch.Tensor]:
    """Logits of a prompt, of steps of several sizes and of steps queued without a wait."""
    runner.allocate(BLOCKS)
    runner.graphs = None  # the streamed one has none, and sizes change what cuBLAS does
    table, found, start = list(range(BLOCKS - 1)), [], 0
    for count in (300, 1, 5, 64, 17, *[1] * 20):
        ids = [(7 * (start + i)) % 1003 for i in range(count)]
        batch = Batch.pack([Chunk(ids, start, table, count)], BLOCK)
        with torch.inference_mode():
            found.append(runner.forward(batch).clone())
        start += count
    return found


@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_layers_compute_what_resident_ones_do(dtype: torch.dtype, late: bool, buffers: int) -> None:
    device, base = torch.device("cuda"), model().to(dtype)
    resident = FusedRunner(copy.deepcopy(base).to(device), BLOCK)
    resident.kernel = None
    stream = place(base, device, plan(base, device, resident=2, buffers=buffers))
    assert stream is not None and stream.streamed == 5
    if late:
        stream = LayerStream(stream._layers, buffers, Slow(device))
    for want, got in zip(passes(resident), passes(FusedRunner(base, BLOCK, stream)), strict=True):
        assert torch.equal(want, got)


def test_pinned_memory_is_pinned_and_given_back() -> None:
    flat = pinned(3 * 2**20 + 5, torch.device("cuda"))
    assert flat.is_pinned() and len(flat) == 3 * 2**20 + 5
    flat.fill_(7)
    there = flat.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert bool((there == 7).all())
    del flat
    again = pinned(3 * 2**20 + 5, torch.device("cuda"))  # likely where the first one was
    assert again.is_pinned()


def text(engine: Engine) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    engine.add(GenerateRequest(id="a", prompt_ids=tuple(range(5, 45)), params=params))
    found: list[int] = []
    while engine.has_work():
        found.extend(token for event in engine.step()[0] for token in event.token_ids)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]) -> str:
    directory = tmp_path_factory.mktemp("offloaded")
    model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def test_an_engine_with_an_offloaded_target_says_the_same(saved: str) -> None:
    sizes: dict[str, Any] = {"kv_blocks": 64, "max_model_len": 512, "max_num_seqs": 4}
    given: dict[str, Any] = {"target": saved, "draft": saved, "dtype": "float32", **sizes}
    plain = text(Engine(EngineConfig(**given)))
    for resident in (0, 2):
        engine = Engine(EngineConfig(**given, offload="target", resident_layers=resident))
        target: Any = engine._parts.target
        assert target.streamed and target.graphs is None and target.kernel is None
        assert len(engine.costs.verify.table()) == 3
        assert text(engine) == plain
    whole: Any = Engine(EngineConfig(**given | {"draft": "none"}, offload="target"))._parts.target
    assert not whole.streamed  # it fits


def test_the_reference_runner_is_refused() -> None:
    with pytest.raises(ConfigError, match="the reference runner streams no layers"):
        build(EngineConfig(target="nowhere", offload="target", runner="reference"))
