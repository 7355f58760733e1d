"""Verdicts to the policies that learn, and their next limits, in one replay of a graph on a GPU.

Launched one by one, these small operations cost the host more than a draft step, between two
iterations, where the device waits. The limits are read when the next iteration is planned.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.long_work import long_work

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(slots, numbers, drafted, accepted), all int64[B], to int64[B], what each row may draft next."""


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """What replays `run` as a CUDA graph; it has run before."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Judge:
    """One captured `rule` for at most `size` rows; rows beyond those given are `spare`, of no policy."""

    @long_work()
    def __init__(self, rule: Rule, size: int, spare: int, device: torch.device) -> None:
        self._size, self._spare, self._rows = size, spare, 0
        self._words = torch.zeros(4, size, dtype=torch.int64, device=device)
        self._host = torch.zeros_like(self._words, device="cpu").pin_memory()
        self._limits = torch.zeros(size, dtype=torch.int64).pin_memory()
        self._done = torch.cuda.Event()
        self._fill([], [], [], [])
        self._words.copy_(self._host)
        rule(*self._words)  # compiles; rows of no policy teach nothing
        self._replay = captured(lambda: self._limits.copy_(rule(*self._words), non_blocking=True), device)

    def begin(
        self, slots: Seq[int], numbers: Seq[int], drafted: Seq[int], accepted: Seq[int] | Tensor
    ) -> None:
        """Queues it for these rows, of which `limits` then tells.

        `accepted` may be int32[2, B] on the device, not known to the host yet: accepted tokens, and whether
        the row is sound; one that is not teaches nothing.
        """
        self._done.synchronize()  # the host's buffers may still be read and written
        self._fill(slots, numbers, drafted, [0] * len(slots) if isinstance(accepted, Tensor) else accepted)
        self._words.copy_(self._host, non_blocking=True)
        if isinstance(accepted, Tensor):
            self._words[3, : len(slots)].copy_(accepted[0])
            self._words[2, : len(slots)].mul_(accepted[1])
        self._replay()
        self._done.record()
        self._rows = len(slots)

    def limits(self) -> list[int]:
        """Waits for what was begun last."""
        self._done.synchronize()
        found: list[int] = self._limits[: self._rows].tolist()
        return found

    def _fill(self, slots: Seq[int], numbers: Seq[int], drafted: Seq[int], accepted: Seq[int]) -> None:
        n, host = len(slots), self._host.numpy()
        host[0, n:], host[1, n:], host[2:, n:] = self._spare, -1, 0
        for line, values in enumerate((slots, numbers, drafted, accepted)):
            host[line, :n] = values
