"""Host seconds spent in some kind of work, summed up between laps."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs within `with`, not nested."""

    def __init__(self) -> None:
        self._seconds = self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._begun

    def lap(self) -> float:
        """Seconds since the last lap; begins the next one."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
