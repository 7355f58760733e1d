"""`offload target`: what of a config goes with it, and the target spread over host and device."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.free_memory import free_memory
from engine.models.offload import LayerStream
from engine.models.placing import check_host, place, plan
from engine.pairing import ConfigError

_CPU = torch.device("cpu")


def refuse(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError if the config's offload, or its lack, does not fit the rest of it."""
    if config.offload == "none":
        if config.resident_layers is not None:
            raise ConfigError(f"resident_layers {config.resident_layers}: without offload all layers are")
        return
    reasons = {
        f"device {device} is no GPU, and layers are only streamed to one": device.type != "cuda",
        "the reference runner streams no layers": config.runner == "reference",
        "triton is not installed": importlib.util.find_spec("triton") is None,
        f"quantization {config.quantization!r}: quantized layers are not streamed": (
            config.quantization != "none"
        ),
        f"draft {config.draft!r} would stream the target's layers for every draft token": (
            config.draft.startswith("self:")
        ),
        f"offload_buffers {config.offload_buffers}: 2 are the least": config.offload_buffers < 2,
    }
    if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
        raise ConfigError(f"offload {config.offload!r}: {reason}")


def host_memory() -> int:
    """Bytes the host has free: ask before the target is loaded, whose files then fill the page cache."""
    return free_memory(_CPU)


def offloaded(
    config: EngineConfig, target: PreTrainedModel, device: torch.device, free_on_host: int
) -> LayerStream | None:
    """Moves a target that was loaded on the CPU to `device` and to pinned memory; None: `device` has it all.

    Raises OffloadError. The draft must be on the device already, for what it leaves is counted.
    """
    placement = plan(target, device, resident=config.resident_layers, buffers=config.offload_buffers)
    check_host(placement, free_on_host)
    return place(target, device, placement)
