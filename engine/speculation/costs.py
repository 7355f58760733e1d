"""What a draft step and a verification cost, by (rows, tokens): measured at start, kept current.

Costs are seconds as the engine meets them, host and device together. Policies decide with them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

_ROWS = (1, 2, 4, 8, 16, 32, 64)
_TOKENS = (*range(1, 17), 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1600)
"""Sizes are told apart as finely as this: enough is seen of each, and a GPU's graphs are as coarse."""
_WEIGHT = 0.05  # of a new observation, once there are many
_OUTLIER = 4.0  # times the known cost: a compilation or a pause, not a cost
_BELIEVED = 8  # outliers in a row: it has become the cost

Key = tuple[int, int]


@dataclass
class _Known:
    seconds: float
    seen: int  # observations in it
    outliers: int = 0  # in a row


class Costs:
    """Costs of passes over `rows` rows and `tokens` tokens in all, of one kind (drafting or verifying)."""

    def __init__(self) -> None:
        self._known: dict[Key, _Known] = {}
        self._met: set[Key] = set()

    def measure(self, run: Callable[[int, int], float], sizes: list[Key], repeat: int = 5) -> None:
        """Fills the table with medians of `run(rows, tokens)`: one pass, which returns its seconds."""
        for rows, tokens in sizes:
            run(rows, tokens)  # compiles and captures
            self.know(rows, tokens, median(run(rows, tokens) for _ in range(repeat)))

    def know(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes this for the cost of the size, as firmly as if it had often been seen."""
        self._known[_key(rows, tokens)] = _Known(seconds, round(1 / _WEIGHT))

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """Moves the cost of this size towards what was just seen; a single outlier is not a cost.

        Nor is the first pass of a size: it compiles and captures.
        """
        key = _key(rows, tokens)
        known = self._known.get(key)
        if known is None:
            if key in self._met:
                self._known[key] = _Known(seconds, 1)
            self._met.add(key)
            return
        if seconds >= _OUTLIER * known.seconds:
            known.outliers += 1
            if known.outliers < _BELIEVED:
                return
            known.seconds, known.seen = seconds, 1
        elif seconds * _OUTLIER <= known.seconds:  # what was taken for the cost was none
            known.seconds, known.seen = seconds, 1
        else:
            known.seen += 1
            known.seconds += max(_WEIGHT, 1 / known.seen) * (seconds - known.seconds)
        known.outliers = 0

    def cost(self, rows: int, tokens: int) -> float | None:
        """Seconds; of a size not seen: from the sizes of the nearest number of rows, linear in tokens between
        and beyond them, and never more than that of more tokens. None while nothing is known."""
        points = self._points(rows)
        if points is None:
            return None
        sizes, seconds, slope = points
        return float(np.interp(tokens, sizes, seconds)) + max(tokens - sizes[-1], 0) * slope

    def line(self, most: int) -> NDArray[np.float32]:
        """float32[most]: `cost(n, n)` for n = 1 to `most`; 0 while nothing is known."""
        return np.array([self.cost(n, n) or 0.0 for n in range(1, most + 1)], dtype=np.float32)

    def at_rows(self, rows: int, most: int) -> NDArray[np.float32]:
        """float32[most + 1]: `cost(rows, n)` for n from 0 to `most`; 0 while nothing is known."""
        points = self._points(rows)
        if points is None:
            return np.zeros(most + 1, dtype=np.float32)
        sizes, seconds, slope = points
        tokens = np.arange(most + 1)
        found = np.interp(tokens, sizes, seconds) + np.maximum(tokens - sizes[-1], 0) * slope
        return found.astype(np.float32)

    def table(self) -> dict[Key, float]:
        """Everything known, by (rows, tokens)."""
        return {key: known.seconds for key, known in self._known.items()}

    def _points(self, rows: int) -> tuple[list[int], NDArray[np.float64], float] | None:
        """Of the nearest number of rows: token counts, seconds that never fall, seconds a token beyond.

        No size costs more than a larger one: what is measured too high is a pause far more often than not.
        """
        if not self._known:
            return None
        sizes_of = Counter(r for r, _ in self._known)
        # One size alone tells nothing of smaller and larger ones, if others do.
        told = [r for r, count in sizes_of.items() if count > 1] or list(sizes_of)
        nearest = min(told, key=lambda r: (abs(r - _ceiling(_ROWS, rows)), r))
        sizes = sorted(t for r, t in self._known if r == nearest)
        seconds = np.minimum.accumulate([self._known[nearest, t].seconds for t in sizes[::-1]])[::-1]
        slope = 0.0
        if len(sizes) > 1:
            slope = float(seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return sizes, seconds, slope


def _key(rows: int, tokens: int) -> Key:
    """The size that stands for this one: the next larger of each."""
    return _ceiling(_ROWS, rows), _ceiling(_TOKENS, tokens)


def _ceiling(sizes: tuple[int, ...], n: int) -> int:
    at = bisect_left(sizes, n)
    return sizes[at] if at < len(sizes) else n


@dataclass
class EngineCosts:
    """A draft step's costs (as many tokens as rows) by drafter, and a verification's."""

    drafts: dict[str, Costs] = field(default_factory=lambda: defaultdict(Costs))
    verify: Costs = field(default_factory=Costs)
