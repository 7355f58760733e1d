"""What `offload` refuses, and an engine whose target is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from engine import offloading, parts
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.fused import FusedRunner
from engine.models.offload import LayerStream
from engine.models.pinned import OffloadError
from engine.offloading import ConfigError, refuse
from engine.types import GenerateRequest, SamplingParams
from server.settings import Settings

CUDA = torch.device("cuda")


def config(**given: Any) -> EngineConfig:
    return EngineConfig(**{"target": "t", "offload": "target"} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runner": "reference"}, "the reference runner streams no layers"),
        ({"quantization": "int8"}, "quantization 'int8': quantized layers are not streamed"),
        ({"draft": "self:2"}, "draft 'self:2' would stream the target's layers"),
        ({"offload_buffers": 1}, "offload_buffers 1: 2 are the least"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"offload 'target': {message}"):
        refuse(config(**given), CUDA)


def test_what_can_is_not() -> None:
    refuse(config(draft_quantization="int8", resident_layers=3, offload_buffers=3), CUDA)
    refuse(config(offload="none", device="cpu"), torch.device("cpu"))


def test_a_cpu_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="offload 'target': device cpu is no GPU"):
        parts.build(config(target="/nowhere", device="cpu"))
    with pytest.raises(ConfigError, match="resident_layers 3: without offload all layers are"):
        parts.build(config(target="/nowhere", offload="none", resident_layers=3))


def test_the_settings_reach_the_engine() -> None:
    made = Settings(offload="target", resident_layers=0, offload_buffers=4).engine_config()
    assert (made.offload, made.resident_layers, made.offload_buffers) == ("target", 0, 4)


def tokens(engine: Engine) -> list[int]:
    request = GenerateRequest(
        id="a", prompt_ids=(5, 9, 5, 9, 7, 5, 9), params=SamplingParams(temperature=0, max_tokens=5)
    )
    engine.add(request)
    found: list[int] = []
    while engine.has_work():
        found.extend(token for event in engine.step()[0] for token in event.token_ids)
    return found


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run in Triton's interpreter, and copies at once."""
    monkeypatch.setattr(parts, "refuse", lambda config, device: None)
    monkeypatch.setattr(parts, "_not_fused", lambda model: None)


@pytest.mark.usefixtures("on_a_cpu")
def test_an_engine_with_a_streamed_target_says_the_same(tiny_llama: Path) -> None:
    given = {"target": str(tiny_llama), "device": "cpu", "kv_blocks": 40, "draft": "ngram", "max_num_seqs": 2}
    engine = Engine(config(**given, resident_layers=1))
    target: Any = engine._parts.target
    assert isinstance(target, FusedRunner) and isinstance(target.decoder.layers, LayerStream)
    assert target.decoder.layers.streamed == 3 and target.graphs is None
    assert engine.costs.verify.table().keys() == {(1, 1)}  # of a few sizes, those a CPU measures
    assert tokens(engine) == tokens(Engine(config(**given, offload="none", runner="reference")))


@pytest.mark.usefixtures("on_a_cpu")
def test_too_little_host_memory_ends_the_start(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "free_memory", lambda device: 2**31 + 5)
    with pytest.raises(OffloadError, match=r"4 layers of 0.00 GiB need .* 2.00 GiB are free"):
        parts.build(config(target=str(tiny_llama), device="cpu", draft="none", resident_layers=0))
