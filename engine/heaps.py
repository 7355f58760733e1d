"""How the C library keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import time

_ARENA_MAX, _HEAPS = -8, 2  # mallopt(3)
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18
_TIDY_SECONDS = 60.0


def lean_heaps() -> None:
    """To be called before there are threads. glibc gives them heaps of their own, up to eight for a core, and
    each keeps the most that its threads once needed; and once it has freed a large block, it puts others of
    that size into heaps, too, where a small one behind them keeps them for good. A process that runs for
    months would grow by all that: here are two heaps, and what is large goes back when it is freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_ARENA_MAX, _HEAPS)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


class Tidy:
    """For a process whose large blocks come and go all the time: to give each back would slow it down. What
    lies free in its heaps goes back now and then, also from between what is in use.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._trim = None
        with contextlib.suppress(OSError, AttributeError):  # another C library
            self._trim = ctypes.CDLL("libc.so.6").malloc_trim

    def now_and_then(self) -> None:
        """To be called often: once a minute it takes some milliseconds."""
        if self._trim is not None and time.monotonic() - self._last > _TIDY_SECONDS:
            self._trim(0)
            self._last = time.monotonic()
