"""From numbers on the host to int32 on the device by one copy, without making a tensor each time."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BUFFERS = 4
"""Copies that may be under way at once; the next one waits for the oldest."""


class Staging:
    """A few pinned buffers in turn, each with its twin on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._next = device, 0
        self._pairs: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def words(self, values: Seq[int] | NDArray[np.int32]) -> Tensor:
        """int32[len(values)] on the device, valid until `_BUFFERS` more calls."""
        if self._device.type != "cuda":
            return torch.tensor(values, dtype=torch.int32)
        self._next = (self._next + 1) % _BUFFERS
        size = len(values)
        if len(self._pairs) < _BUFFERS or self._pairs[0][0].shape[0] < size:
            torch.cuda.synchronize(self._device)  # the old ones may be in use
            length = max(4096, 1 << (size - 1).bit_length())
            self._pairs = [
                (
                    torch.zeros(length, dtype=torch.int32).pin_memory(),
                    torch.zeros(length, dtype=torch.int32, device=self._device),
                    torch.cuda.Event(),
                )
                for _ in range(_BUFFERS)
            ]
        host, there, copied = self._pairs[self._next]
        copied.synchronize()
        host.numpy()[:size] = values
        there[:size].copy_(host[:size], non_blocking=True)
        copied.record()
        return there[:size]
