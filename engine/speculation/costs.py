"""What a draft step and a verification cost, by (rows, tokens): measured at start, kept current.

Costs are seconds as the engine meets them, host and device together. Policies decide with them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

_WEIGHT = 0.05  # of a new observation
_OUTLIER = 4.0  # times the known cost: a compilation or a pause, not a cost
_BELIEVED = 8  # outliers in a row: it has become the cost

Key = tuple[int, int]


class Costs:
    """Costs of passes over `rows` rows and `tokens` tokens in all, of one kind (drafting or verifying)."""

    def __init__(self) -> None:
        self._known: dict[Key, float] = {}
        self._outliers: dict[Key, int] = {}  # in a row

    def measure(self, run: Callable[[int, int], float], sizes: list[Key], repeat: int = 5) -> None:
        """Fills the table with medians of `run(rows, tokens)`: one pass, which returns its seconds."""
        for rows, tokens in sizes:
            run(rows, tokens)  # compiles and captures
            self._known[rows, tokens] = median(run(rows, tokens) for _ in range(repeat))

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """Moves the cost of this size towards what was just seen; a single outlier is not a cost."""
        key = rows, tokens
        known = self._known.get(key)
        outlier = known is not None and seconds >= _OUTLIER * known
        self._outliers[key] = self._outliers.get(key, 0) + 1 if outlier else 0
        if known is None or self._outliers[key] >= _BELIEVED:
            self._known[key], self._outliers[key] = seconds, 0
        elif not outlier:
            self._known[key] = known + _WEIGHT * (seconds - known)

    def cost(self, rows: int, tokens: int) -> float | None:
        """Seconds; of a size not seen: from the sizes of the nearest number of rows, linear in tokens between
        and beyond them, and never less than that of fewer tokens. None while nothing is known."""
        if (rows, tokens) in self._known:
            return self._known[rows, tokens]
        if not self._known:
            return None
        nearest = min({r for r, _ in self._known}, key=lambda r: (abs(r - rows), r))
        sizes = sorted(t for r, t in self._known if r == nearest)
        seconds = [self._known[nearest, t] for t in sizes]
        if len(sizes) == 1 or tokens <= sizes[0]:
            return seconds[0]
        at = min(max(bisect_left(sizes, tokens), 1), len(sizes) - 1)
        slope = (seconds[at] - seconds[at - 1]) / (sizes[at] - sizes[at - 1])
        return max(seconds[at - 1] + max(slope, 0.0) * (tokens - sizes[at - 1]), seconds[at - 1])

    def table(self) -> dict[Key, float]:
        """Everything known, by (rows, tokens)."""
        return dict(self._known)


@dataclass
class EngineCosts:
    """A draft step's costs (as many tokens as rows) and a verification's."""

    draft: Costs = field(default_factory=Costs)
    verify: Costs = field(default_factory=Costs)
