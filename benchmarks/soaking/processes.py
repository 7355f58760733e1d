"""Memory and open files of the server's processes over time."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil
from scipy.stats import linregress

_MIB = 2.0**20


@dataclass(frozen=True)
class Slope:
    """MiB an hour by least squares, and its standard error."""

    per_hour: float
    error: float
    points: int


@dataclass(frozen=True)
class Standing:
    """What the processes hold at one moment. `resident`: MiB; all by role."""

    resident: dict[str, float]
    descriptors: dict[str, int]
    threads: dict[str, int]
    processes: dict[str, int]


@dataclass
class Watch:
    """The server's process and its children. The engine is the largest child there is at the start.

    Raises psutil.Error where the process is not there, or not ours to look at.
    """

    pid: int
    resident: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    engine: int | None = None

    def __post_init__(self) -> None:
        self._root = psutil.Process(self.pid)
        children = self._root.children()
        if children:
            self.engine = max(children, key=lambda child: child.memory_info().rss).pid

    def stand(self) -> Standing:
        """As it is now."""
        found: list[dict[str, float]] = [defaultdict(int) for _ in range(4)]
        for process in (self._root, *self._root.children(recursive=True)):
            role = {self.pid: "server", self.engine: "engine"}.get(process.pid, "others")
            try:
                with process.oneshot():
                    figures = (
                        process.memory_info().rss / _MIB, process.num_fds(), process.num_threads(), 1
                    )  # fmt: skip
            except psutil.NoSuchProcess:
                if process.pid == self.pid:
                    raise
                continue
            for sums, figure in zip(found, figures, strict=True):
                sums[role] += figure
        return Standing(*(dict(sums) for sums in found))  # type: ignore[arg-type]

    async def look(self, every: float) -> None:
        """Notes resident memory every so many seconds, until cancelled."""
        while True:
            now = time.monotonic()
            resident = self.stand().resident
            for role, size in resident.items():
                self.resident[role].append((now, size))
            self.resident["all"].append((now, sum(resident.values())))
            await asyncio.sleep(every)

    def floors(self, role: str, since: float, until: float, window: float) -> list[tuple[float, float]]:
        """The least of every `window` seconds in between: seconds after `since`, MiB.

        Tensors of a step come and go by hundreds of MiB; what is never given back lifts the least.
        """
        by_window: dict[int, list[float]] = defaultdict(list)
        for at, size in self.resident[role]:
            if since <= at < until:
                by_window[int((at - since) // window)].append(size)
        return [((number + 0.5) * window, min(sizes)) for number, sizes in sorted(by_window.items())]


def slope(points: list[tuple[float, float]]) -> Slope:
    """Of (seconds, MiB). One a minute or so, for the error takes them as independent."""
    if len(points) < 3:
        raise ValueError(f"{len(points)} points say nothing of a slope")
    if len({size for _, size in points}) == 1:  # it has no correlation, and so no error
        return Slope(0.0, 0.0, len(points))
    fit = linregress([at / 3600 for at, _ in points], [size for _, size in points])
    return Slope(float(fit.slope), float(fit.stderr), len(points))
