"""Out of memory: what it is, and how it is told, with numbers."""

from __future__ import annotations

import logging
import math
import re
import time
from pathlib import Path

import psutil
import torch

from engine.free_memory import free_memory

log = logging.getLogger(__name__)

_QUIET = 60.0  # seconds between lines in the log
_SAID_BY_TORCH = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_EVENTS = Path("/sys/fs/cgroup/memory.events")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host. Neither harms the process: what asked for the memory did not get it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The host's allocator raises a plain RuntimeError. CUDA's own "out of memory" is sticky, and a fault.
    return (
        type(error) is RuntimeError and "CUDA" not in str(error) and bool(_SAID_BY_TORCH.search(str(error)))
    )


def poisons(error: BaseException) -> bool:
    """Whether the device is lost with it: whatever this process does next, it fails."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA" in str(error)
    )


class Shortage:
    """Says in the log that memory ran out, and is quiet about it for a minute."""

    def __init__(self) -> None:
        self._told = -math.inf

    def tell(self, what: str) -> None:
        """`what`: where it ran out, and what became of that."""
        if time.monotonic() - self._told > _QUIET:
            self._told = time.monotonic()
            log.warning("out of memory %s. Lower memory_fraction, max_num_seqs or token_budget", what)


def advice(error: BaseException) -> str:
    """One line: what was asked for, what there is, and which settings lower it."""
    asked = " ".join(str(error).split()) or "an allocation failed"
    asked = asked.partition(" If reserved but unallocated")[0][:300]
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        where = "on the GPU"
    else:
        free, total = free_memory(torch.device("cpu")), psutil.virtual_memory().total
        where = "of the host, or of this container"
    return (
        f"out of memory: {asked}; {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free {where}. Lower "
        "memory_fraction, max_num_seqs, token_budget or max_model_len, quantize, or take a smaller model"
    )


def oom_kills(events: Path = _EVENTS) -> int:
    """Processes of this container that the system has killed for want of memory; 0 where it does not tell."""
    try:
        lines = events.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
