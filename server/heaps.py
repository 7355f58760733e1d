"""The C library's heaps."""

from __future__ import annotations

import contextlib
import ctypes

_ARENA_MAX, _HEAPS = -8, 2  # mallopt(3)


def few_heaps() -> None:
    """To be called before there are threads. glibc gives them heaps of their own, up to eight for a core, and
    each keeps the most that its threads once needed: a process that runs for months would grow by them all.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_ARENA_MAX, _HEAPS)
