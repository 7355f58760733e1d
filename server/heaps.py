"""How the C library keeps memory."""

from __future__ import annotations

import contextlib
import ctypes

_ARENA_MAX, _HEAPS = -8, 2  # mallopt(3)
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18


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
