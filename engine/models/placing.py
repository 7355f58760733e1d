"""Where the layers of an offloaded model lie: some on the device, the others in pinned memory of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.free_memory import free_memory
from engine.models.decoder import DecoderLayer, layer_weights, unsupported
from engine.models.offload import (
    CudaMover,
    HostLayer,
    LayerStream,
    PlainMover,
    flat_bytes,
    packed,
    tensors,
)
from engine.models.pinned import OffloadError, pinned

_LEFT = 0.2
"""Of the device's free memory what layers leave, where nobody says how many to keep: for KV and passes."""
_SPARE = 2 * 2**30  # bytes of the host that pinning leaves
_GIB = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """How a model's layers are spread: the first `streamed` come and go, the `resident` last ones stay."""

    resident: int
    streamed: int
    layer_bytes: int  # of the largest layer
    buffers: int

    @property
    def host_bytes(self) -> int:
        """What is pinned if no two layers share their weights."""
        return self.streamed * self.layer_bytes


def plan(
    model: PreTrainedModel, device: torch.device, *, resident: int | None = None, buffers: int = 2
) -> Placement:
    """Spreads the layers over what `device` has free; `resident` None: as many as fit.

    The model may lie anywhere, on "meta" too. Raises OffloadError.
    """
    if (reason := unsupported(model)) is not None:
        raise OffloadError(f"offload 'target': {reason}")
    core: Any = model.model
    count = len(core.layers)
    size = max(sum(p.nbytes for p in layer.parameters()) for layer in core.layers)
    outside = {id(p): p.nbytes for module in _outside(model) for p in module.parameters()}
    free = free_memory(device) - sum(outside.values())
    if resident is None:
        room = int(free * (1 - _LEFT))
        fit = room // size
        resident = count if fit >= count else max(0, (room - buffers * size) // size)
    if resident > count:
        raise OffloadError(f"resident_layers {resident}: the target has {count} layers")
    streamed = count - resident
    need = (resident + (buffers if streamed else 0)) * size
    if need > free:
        raise OffloadError(
            f"offload 'target': {resident} resident layers and {buffers} buffers of {_gib(size)} need "
            f"{_gib(need)} on {device}, which has {_gib(max(free, 0))} beside embeddings and head"
        )
    return Placement(resident, streamed, size, buffers)


def check_host(placement: Placement, free: int) -> None:
    """Raises OffloadError if `free` bytes of the host's memory cannot hold what is to be pinned."""
    if placement.host_bytes + _SPARE > free:
        raise OffloadError(
            f"offload 'target': {placement.streamed} layers of {_gib(placement.layer_bytes)} need "
            f"{_gib(placement.host_bytes)} of pinned host memory and {_gib(_SPARE)} beside it; "
            f"{_gib(free)} are free. More resident_layers would need less"
        )


@torch.no_grad()
def place(
    model: PreTrainedModel,
    device: torch.device,
    placement: Placement,
    ready: Callable[[int], None] = lambda index: None,
) -> LayerStream | None:
    """Moves the model: embedding, norm and head to `device`, and its layers as planned.

    Layer by layer: neither memory ever holds the whole model twice. `ready(i)` is called before layer
    i is moved, and may fill it. Layers whose weights are an earlier one's share its host memory.
    None: every layer is on the device.
    """
    core: Any = model.model
    for module in _outside(model):
        module.to(device)
    layers: list[DecoderLayer | HostLayer] = []
    flats: dict[int, HostLayer] = {}
    for index, layer in enumerate(core.layers):
        ready(index)
        if index >= placement.streamed:
            layer.to(device)
            layers.append(layer_weights(model, index))
            continue
        made = _on_the_host(layer, layer_weights(model, index), flats, device)
        flats[made.flat.data_ptr()] = made
        layers.append(made)
    pinned_bytes = sum(len(each.flat) for each in flats.values())
    log.info(
        "%d of %d layers stay on %s; %d of %s are streamed through %d buffers, from %s pinned",
        placement.resident,
        len(layers),
        device,
        placement.streamed,
        _gib(placement.layer_bytes),
        placement.buffers if placement.streamed else 0,
        _gib(pinned_bytes),
    )
    if not placement.streamed:
        return None
    mover = CudaMover(device) if device.type == "cuda" else PlainMover()
    return LayerStream(layers, placement.buffers, mover)


def _outside(model: PreTrainedModel) -> list[nn.Module]:
    """All but the layers."""
    core: Any = model.model
    return [core.embed_tokens, core.norm, core.rotary_emb, model.lm_head]


def _on_the_host(
    layer: nn.Module, weights: DecoderLayer, flats: dict[int, HostLayer], device: torch.device
) -> HostLayer:
    """The layer in pinned memory, of which its parameters become views."""
    parts = tensors(weights)
    at = {t.untyped_storage().data_ptr() for t in parts.values()}
    known = flats.get(at.pop()) if len(at) == 1 else None
    if known is not None:
        there = {name: t.data_ptr() for name, t in tensors(known.weights).items()}
        if there == {name: t.data_ptr() for name, t in parts.items()}:
            return HostLayer(known.flat, weights)
    made = packed(weights, pinned(flat_bytes(weights), device))
    pairs = [(t, tensors(made.weights)[name]) for name, t in parts.items()]
    for parameter in layer.parameters():
        parameter.data = _twin(parameter.data, pairs)
    return made


def _twin(part: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of a tensor that is a slice of rows of one of the first, the same slice of the second."""
    for old, new in pairs:
        offset = part.data_ptr() - old.data_ptr()
        if 0 <= offset < old.nbytes:
            begin = offset // part.element_size()
            return new.view(-1)[begin : begin + part.numel()].view(part.shape)
    raise OffloadError("offload 'target': a layer has weights that the runner does not know")


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
