"""Layers that are streamed: their order, the reuse of buffers, and a runner that sees no difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

pytest.importorskip("triton")

import test_fused_runner as fused
import test_reference_runner as reference
from test_reference_runner import BLOCK

from engine.models import placing
from engine.models.decoder import DecoderLayer
from engine.models.fused import FusedRunner
from engine.models.offload import (
    HostLayer,
    LayerStream,
    PlainMover,
    Slot,
    flat_bytes,
    lent,
    packed,
    tensors,
)
from engine.models.pinned import OffloadError
from engine.models.placing import Placement, check_host, place, plan
from engine.models.quantize import quantize_linears
from engine.models.runner import Batch, Chunk
from engine.models.selfcheck import own_logits

CPU = torch.device("cpu")
MATRICES = ("qkv", "out", "gate_up", "down", "norm_in", "norm_mid")


class Late(PlainMover):
    """Copies as late as a device may: when they are waited for. What is released is poisoned at once."""

    def __init__(self) -> None:
        self.queued: dict[int, Tensor] = {}
        self.read: set[int] = set()
        self.log: list[str] = []
        self.slots: list[Slot] = []

    def slot(self, size: int) -> Slot:
        slot = super().slot(size)
        slot.buffer.fill_(255)  # NaN
        self.slots.append(slot)
        return slot

    def _name(self, slot: Slot) -> int:
        return next(i for i, each in enumerate(self.slots) if each is slot)

    def fill(self, slot: Slot, source: Tensor) -> None:
        name = self._name(slot)
        assert name not in self.read, "filled while it is read"
        slot.buffer.fill_(255)
        self.queued[name] = source
        self.log.append(f"fill {name}")

    def await_(self, slot: Slot) -> None:
        name = self._name(slot)
        super().fill(slot, self.queued[name])
        self.read.add(name)
        self.log.append(f"use {name}")

    def released(self, slot: Slot) -> None:
        name = self._name(slot)
        self.read.discard(name)
        slot.buffer.fill_(255)


def layer(value: float, window: int | None = None) -> DecoderLayer:
    made = {name: torch.full((3, 5), value) for name in MATRICES}
    none = dict.fromkeys(("qkv_bias", "out_bias", "gate_up_bias", "down_bias", "query_norm", "key_norm"))
    return DecoderLayer(**made, **none, window=window)  # type: ignore[arg-type]


def on_host(value: float, window: int | None = None) -> HostLayer:
    made = layer(value, window)
    return packed(made, torch.empty(flat_bytes(made), dtype=torch.uint8))


def values(passing: Any) -> list[float]:
    """What each layer holds when it is its turn; all of its weights must hold the same."""
    found = []
    for each in passing:
        parts = {float(x) for t in tensors(each).values() for x in t.flatten()}
        assert len(parts) == 1, parts
        found.append(parts.pop())
    return found


@pytest.mark.parametrize("buffers", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_layers_come_in_order_pass_after_pass(count: int, buffers: int) -> None:
    stream = LayerStream([on_host(float(i)) for i in range(count)], buffers, Late())
    for _ in range(4):
        assert values(stream) == [float(i) for i in range(count)]
    assert len(stream) == stream.streamed == count


def test_resident_layers_stay_between_streamed_ones() -> None:
    resident = layer(1.0, window=3)
    stream = LayerStream([on_host(0.0), resident, on_host(2.0, window=9), layer(3.0)], 2, Late())
    for _ in range(3):
        assert values(stream) == [0.0, 1.0, 2.0, 3.0]
    assert [each.window for each in stream] == [None, 3, 9, None]
    assert list(stream)[1] is resident
    assert stream.streamed == 2 and stream.streamed_bytes == 2 * flat_bytes(resident)


def test_the_next_layers_and_the_next_pass_are_fetched_ahead() -> None:
    mover = Late()
    stream = LayerStream([on_host(float(i)) for i in range(3)], 2, mover)
    assert mover.log == ["fill 0", "fill 1"]
    mover.log.clear()
    values(stream)
    assert mover.log == ["use 0", "fill 0", "use 1", "fill 1", "use 0", "fill 0"]
    assert [float(mover.queued[i].view(torch.float32)[0]) for i in (1, 0)] == [0.0, 1.0]  # of the next pass


def test_a_buffer_is_another_layers_once_the_next_is_asked_for() -> None:
    stream = LayerStream([on_host(float(i)) for i in range(3)], 2, Late())
    passing = iter(stream)
    first = next(passing)
    next(passing)
    assert bool(tensors(first)["qkv"].isnan().all())


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_pass_that_broke_off_leaves_the_next_whole(stop: int) -> None:
    stream = LayerStream([on_host(float(i)) for i in range(5)], 2, Late())
    values(stream)
    passing = iter(stream)
    kept = [next(passing) for _ in range(stop)]
    for _ in range(2):
        assert values(stream) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(kept) == stop


def test_layers_may_share_what_is_streamed() -> None:
    dead = on_host(7.0)
    mover = Late()
    stream = LayerStream(
        [on_host(0.0), dead, replace(dead, weights=replace(dead.weights, window=4))], 2, mover
    )
    for _ in range(3):
        assert values(stream) == [0.0, 7.0, 7.0]
    assert stream.streamed == 3 and mover.log.count("fill 0") + mover.log.count("fill 1") == 2 + 9


def test_nothing_to_stream_and_too_few_buffers_are_errors() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        LayerStream([layer(0.0)], 2, Late())
    with pytest.raises(ValueError, match="1 buffers"):
        LayerStream([on_host(0.0)], 1, Late())


def placed(model: PreTrainedModel, resident: int, late: bool = True) -> LayerStream:
    stream = place(model, CPU, Placement(resident, len(model.model.layers) - resident, 1, 2))  # type: ignore[arg-type]
    assert stream is not None
    return LayerStream(stream._layers, 2, Late()) if late else stream


@pytest.mark.parametrize(
    ("name", "resident"), [("llama, biases and tied", 0), ("qwen2, sliding", 1), ("qwen3", 0)]
)
def test_a_streamed_runner_is_the_resident_one(name: str, resident: int) -> None:
    config: Callable[[], PreTrainedConfig] = fused.CONFIGS[name]
    model = reference.make(fused.shallow(config()))
    twin = copy.deepcopy(model)
    plain, streamed = FusedRunner(twin, BLOCK), FusedRunner(model, BLOCK, placed(model, resident))
    assert streamed.streamed and not plain.streamed
    ids, table = [7 * i % 50 + 3 for i in range(16)], [5, 1, 4, 0]
    for each in (plain, streamed):
        each.allocate(6)
    for start, end in ((0, 12), (12, 16)):  # longer than the window
        batch = Batch.pack([Chunk(ids[start:end], start, table, end - start)], BLOCK)
        want, got = (each.forward(batch) for each in (plain, streamed))
        assert bool(want.isfinite().all()) and torch.equal(want, got)


def test_the_models_own_forward_reads_the_stream_and_is_given_back() -> None:
    model = reference.make(fused.shallow(fused.CONFIGS["qwen2"]()))
    want = own_logits(model)
    stream = placed(model, 0)
    homes = [p.data_ptr() for p in model.parameters()]
    with lent(model, stream):
        assert all(torch.equal(own_logits(model), want) for _ in range(3))
    assert [p.data_ptr() for p in model.parameters()] == homes
    host = [each for each in stream._layers if isinstance(each, HostLayer)]
    for each in host:
        each.flat.fill_(255)
    with lent(model, stream):
        assert bool(own_logits(model).isnan().all())  # it is what was read
    mover = stream._mover
    assert isinstance(mover, Late) and not mover.read  # and every buffer came back


def test_layers_in_another_order_are_found_at_start() -> None:
    model = reference.make(fused.shallow(fused.CONFIGS["llama"]()))
    stream = placed(model, 0)
    runner = FusedRunner(model, BLOCK, stream)
    runner.decoder.layers = LayerStream(stream._layers[::-1], 2, Late())
    with lent(model, stream):
        expected = own_logits(model)
    with pytest.raises(fused.UnsupportedModel, match="does not run over a paged KV"):
        fused.selfcheck.check(runner, "llama", BLOCK, expected, exact=True)


def test_layers_of_the_same_parameters_are_held_once() -> None:
    model = reference.make(fused.CONFIGS["llama, biases and tied"]())
    core: Any = model.model
    source = core.layers[1]

    def ready(index: int) -> None:  # as a benchmark fills a model of which most layers are alike
        if index > 1:
            for mine, its in zip(core.layers[index].parameters(), source.parameters(), strict=True):
                mine.data = its.data

    stream = place(model, CPU, plan(model, CPU, resident=0), ready)
    assert stream is not None
    host = [each for each in stream._layers if isinstance(each, HostLayer)]
    assert len({each.flat.data_ptr() for each in host}) == 2 < len(host)
    with lent(model, stream):
        streamed = own_logits(model)
    again = reference.make(fused.CONFIGS["llama, biases and tied"]())
    core = again.model
    for each in core.layers[2:]:
        each.load_state_dict(core.layers[1].state_dict())
    assert torch.equal(streamed, own_logits(again))


def test_the_last_layers_are_the_resident_ones() -> None:
    model = reference.make(fused.CONFIGS["llama"]())
    stream = place(model, CPU, plan(model, CPU, resident=1))
    assert stream is not None
    assert [isinstance(each, HostLayer) for each in stream._layers] == [True, True, True, False]
    assert stream.streamed_bytes == sum(len(each.flat) for each in stream._layers[:3])  # type: ignore[union-attr]


def test_where_all_fits_nothing_is_streamed() -> None:
    model = reference.make(fused.CONFIGS["llama"]())
    found = plan(model, CPU)
    assert found.resident == len(model.model.layers) and found.streamed == 0  # type: ignore[arg-type]
    assert place(model, CPU, found) is None
    assert torch.equal(own_logits(model), own_logits(reference.make(fused.CONFIGS["llama"]())))


def test_layers_are_spread_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference.make(fused.CONFIGS["llama"]())
    core: Any = model.model
    size = sum(p.nbytes for p in core.layers[0].parameters())
    outside = sum(p.nbytes for p in (*core.embed_tokens.parameters(), *core.norm.parameters()))
    outside += model.lm_head.weight.nbytes  # type: ignore[union-attr,operator]

    def free(layers: float) -> None:
        monkeypatch.setattr(placing, "free_memory", lambda device: outside + int(size * layers))

    free(5.1)  # of which a fifth stays: four fit
    assert plan(model, CPU) == Placement(4, 0, size, 2)
    free(4.9)  # three would: of which two are buffers
    assert plan(model, CPU) == Placement(1, 3, size, 2)
    free(2.1)
    assert plan(model, CPU) == Placement(0, 4, size, 2)
    free(1.9)
    with pytest.raises(OffloadError, match=r"0 resident layers and 2 buffers of .* GiB need .* on cpu"):
        plan(model, CPU)
    free(3.5)
    assert plan(model, CPU, resident=1).streamed == 3
    with pytest.raises(OffloadError, match="2 resident layers and 2 buffers"):
        plan(model, CPU, resident=2)
    with pytest.raises(OffloadError, match="resident_layers 5: the target has 4 layers"):
        plan(model, CPU, resident=5)


def test_too_little_host_memory_is_told_in_numbers() -> None:
    layers = Placement(resident=10, streamed=70, layer_bytes=2**30, buffers=2)
    check_host(layers, 72 * 2**30)
    with pytest.raises(OffloadError, match=r"70 layers of 1.00 GiB need 70.00 GiB .* 71.00 GiB are free"):
        check_host(layers, 71 * 2**30)


def test_quantized_layers_and_other_families_are_refused() -> None:
    config = fused.LlamaConfig(**fused.GROUPED | {"hidden_size": 64, "intermediate_size": 128})
    model = reference.make(config)
    quantize_linears(model, "int8")
    with pytest.raises(OffloadError, match="qkv is a QuantizedWeight"):
        place(model, CPU, plan(model, CPU, resident=0))
    other = reference.make(reference.CONFIGS["gpt2"]())
    with pytest.raises(OffloadError, match="GPT2LMHeadModel is not of the Llama family"):
        plan(other, CPU)
