"""How much of a device's memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_memory(device: torch.device, cgroup: Path = _CGROUP) -> int:
    """Bytes. Of the host: what it has free, or less where a container's limit (cgroup v2, v1) leaves less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for limit, usage in _FILES:
        try:
            most, used = (cgroup / limit).read_text().strip(), (cgroup / usage).read_text().strip()
        except OSError:
            continue
        if most.isdigit() and used.isdigit():  # "max": without a limit
            free = min(free, max(int(most) - int(used), 0))
    return free
