"""Host memory that a GPU copies from by itself, in exactly the size asked for."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from engine.models.folder import first_line
from engine.types import CannotLoad

log = logging.getLogger(__name__)


class OffloadError(CannotLoad):
    """The model's layers cannot be kept on the host as asked."""


def pinned(size: int, device: torch.device) -> Tensor:
    """uint8[size] of host memory that `device` reads by itself; any memory where that is the CPU.

    Not torch's own pinned memory: it comes in powers of two. Raises OffloadError.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OffloadError(f"offload 'target': {size:,} bytes of host memory: {error}") from error
    for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):  # a fork would copy what is pinned
        with contextlib.suppress(OSError):  # a kernel without it
            memory.madvise(advice)
    flat = torch.frombuffer(memory, dtype=torch.uint8).zero_()  # its pages made by all threads
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        failed = int(runtime.cudaHostRegister(flat.data_ptr(), size, 1))  # 1: for every context
    if failed:
        del flat, memory
        return _torchs_own(size, device, failed)
    end = weakref.finalize(memory, runtime.cudaHostUnregister, flat.data_ptr())
    end.atexit = False  # the device's context may be gone by then
    return flat


def _torchs_own(size: int, device: torch.device, failed: int) -> Tensor:
    """Where a system registers no memory: up to twice as much of it."""
    with contextlib.suppress(RuntimeError):  # takes the error that the next launch would be blamed for
        torch.zeros(1, device=device)
    log.warning(
        "CUDA error %d: memory cannot be registered, so each layer is pinned in a power of two", failed
    )
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = first_line(error)
        raise OffloadError(f"offload 'target': {size:,} bytes cannot be pinned: {reason}") from error
