"""Work within a step whose time has no bound: compiling kernels, capturing graphs.

Whoever watches how long steps take is told when it begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tell: ContextVar[Callable[[bool], None] | None] = ContextVar("long_work", default=None)


@contextmanager
def long_work() -> Iterator[None]:
    """Around such work, on the engine's thread. Also a decorator."""
    tell = _tell.get()
    if tell is None:
        yield
        return
    tell(True)
    try:
        yield
    finally:
        tell(False)


@contextmanager
def told(tell: Callable[[bool], None]) -> Iterator[None]:
    """Within, this thread's long work is told: True when it begins, False when it is over."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
