"""Decoder layers that stay in pinned host memory and pass through a few buffers on the device.

While one layer computes, the next ones are copied; at the end of a pass the first layers of the next
pass are. A target pass then takes as long as its streamed bytes take over the bus, however few its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.decoder import DecoderLayer
from engine.models.pinned import OffloadError

_ALIGNED = 256  # bytes: where a weight may begin in a buffer, as in memory of torch's own


@dataclass(frozen=True)
class HostLayer:
    """One layer's weights side by side in `flat` uint8[n] on the host; `weights` are views of it.

    Layers of the same weights may share a `flat`: it is then copied for each of them.
    """

    flat: Tensor
    weights: DecoderLayer

    def on(self, buffer: Tensor) -> DecoderLayer:
        """The weights as views of a buffer that `flat` was copied to."""
        there: dict[str, Any] = {name: moved(t, self.flat, buffer) for name, t in self._weights}
        return replace(self.weights, **there)

    @functools.cached_property
    def _weights(self) -> list[tuple[str, Tensor]]:
        return list(tensors(self.weights).items())


def tensors(layer: DecoderLayer) -> dict[str, Tensor]:
    """A layer's weights by field. Raises OffloadError if they are quantized."""
    found: dict[str, Tensor] = {}
    for name in (field.name for field in fields(layer)):
        value: Any = getattr(layer, name)
        if isinstance(value, Tensor):
            found[name] = value
        elif value is not None and name != "window":
            raise OffloadError(f"offload 'target': its {name} is a {type(value).__name__}")
    return found


def moved(tensor: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Of a tensor that lies in `source` uint8[n] its place in `target` uint8[>= n]."""
    offset = tensor.data_ptr() - source.data_ptr()
    return target[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def flat_bytes(layer: DecoderLayer) -> int:
    """Bytes of the buffer that holds the layer's weights."""
    return sum(_padded(t.nbytes) for t in tensors(layer).values())


def packed(layer: DecoderLayer, flat: Tensor) -> HostLayer:
    """The layer copied into `flat` uint8[flat_bytes(layer)]."""
    views: dict[str, Any] = {}
    offset = 0
    for name, t in tensors(layer).items():
        views[name] = flat[offset : offset + t.nbytes].view(t.dtype).view(t.shape)
        views[name].copy_(t)
        offset += _padded(t.nbytes)
    return HostLayer(flat, replace(layer, **views))


@dataclass
class Slot:
    """A buffer on the device. `filled`: the copy into it is done; `free`: what read it is."""

    buffer: Tensor  # uint8[n]
    filled: Any = None
    free: Any = None


class Mover(Protocol):
    """Copies from the host beside what computes. Calls come in the order of the pass."""

    def slot(self, size: int) -> Slot: ...

    def fill(self, slot: Slot, source: Tensor) -> None:
        """Queues the copy of `source` into the slot, behind all that was to read it before `released`."""
        ...

    def await_(self, slot: Slot) -> None:
        """What computes next waits for the slot's last copy."""
        ...

    def released(self, slot: Slot) -> None:
        """What was queued so far was the last to read the slot."""
        ...


class PlainMover:
    """On the CPU, where everything happens at once."""

    def slot(self, size: int) -> Slot:
        return Slot(torch.empty(size, dtype=torch.uint8))

    def fill(self, slot: Slot, source: Tensor) -> None:
        slot.buffer[: len(source)].copy_(source)

    def await_(self, slot: Slot) -> None: ...

    def released(self, slot: Slot) -> None: ...


class CudaMover:
    """On a stream of its own, with events both ways."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def slot(self, size: int) -> Slot:
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        slot = Slot(buffer, torch.cuda.Event(), torch.cuda.Event())
        self.released(slot)  # its memory may have been another's, whose readers are still to run
        return slot

    def fill(self, slot: Slot, source: Tensor) -> None:
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            slot.buffer[: len(source)].copy_(source, non_blocking=True)
        slot.filled.record(self._stream)

    def await_(self, slot: Slot) -> None:
        torch.cuda.current_stream(self._device).wait_event(slot.filled)

    def released(self, slot: Slot) -> None:
        slot.free.record(torch.cuda.current_stream(self._device))


class LayerStream:
    """A model's layers in order, as often as it is iterated over: each is valid until the next is asked for.

    A `DecoderLayer` is on the device already; a `HostLayer` is streamed. Only one iteration at a time; one
    that was left half-way does no harm to the next.
    """

    def __init__(self, layers: Seq[DecoderLayer | HostLayer], buffers: int, mover: Mover) -> None:
        """`buffers` >= 2 on the device. Raises ValueError if none of the layers is streamed."""
        self._layers, self._mover = list(layers), mover
        self._streamed = [layer for layer in layers if isinstance(layer, HostLayer)]
        if not self._streamed or buffers < 2:
            raise ValueError(f"{len(self._streamed)} layers to stream through {buffers} buffers")
        size = max(len(layer.flat) for layer in self._streamed)
        self._slots = [mover.slot(size) for _ in range(buffers)]
        self._turn = 0  # streamed layers that were used
        self._begin()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def streamed(self) -> int:
        """Layers that are streamed in each pass."""
        return len(self._streamed)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the bus in each pass."""
        return sum(len(layer.flat) for layer in self._streamed)

    def __iter__(self) -> Iterator[DecoderLayer]:
        for layer, buffer in self.passing():
            yield layer if isinstance(layer, DecoderLayer) else layer.on(buffer)

    def passing(self) -> Iterator[tuple[DecoderLayer | HostLayer, Tensor]]:
        """Layers with the buffer on the device that now holds them (empty for those that are there)."""
        if self._turn % len(self._streamed):  # an earlier pass did not come to its end
            for slot in self._slots:
                self._mover.released(slot)
            self._begin()
        none = self._slots[0].buffer[:0]
        for layer in self._layers:
            if isinstance(layer, DecoderLayer):
                yield layer, none
                continue
            slot = self._slots[self._turn % len(self._slots)]
            self._mover.await_(slot)
            yield layer, slot.buffer
            self._mover.released(slot)
            self._fill(self._turn + len(self._slots))
            self._turn += 1

    def _begin(self) -> None:
        self._turn = 0
        for turn in range(len(self._slots)):
            self._fill(turn)

    def _fill(self, turn: int) -> None:
        """Copies the layer of a turn into its slot."""
        source = self._streamed[turn % len(self._streamed)].flat
        self._mover.fill(self._slots[turn % len(self._slots)], source)


@contextmanager
def lent(model: PreTrainedModel, stream: LayerStream) -> Iterator[None]:
    """The model's own layers read what the stream brings: its own forward runs where the buffers are.

    `stream` must be of the model's layers, whose parameters lie in the `flat` of theirs.
    """
    core: Any = model.model
    layers, passing = list(core.layers), iter(stream.passing())
    homes: list[tuple[Any, Tensor]] = []

    def before(module: Any, args: Any) -> None:
        nonlocal passing
        if module is layers[0]:
            passing = iter(stream.passing())
        layer, buffer = next(passing)
        if isinstance(layer, HostLayer):
            for parameter in module.parameters():
                homes.append((parameter, parameter.data))
                parameter.data = moved(parameter.data, layer.flat, buffer)

    def after(module: Any, args: Any, output: Any) -> None:
        restore()
        if module is layers[-1]:
            next(passing, None)  # gives the last buffer back

    def restore() -> None:
        while homes:
            parameter, data = homes.pop()
            parameter.data = data

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
