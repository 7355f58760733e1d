"""Work within a step whose time has no bound: compiling kernels, capturing graphs.

Whoever watches how long steps take is told when it begins and ends. No garbage is collected meanwhile: what
holds a graph or memory of the device must not be freed while another graph is being captured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tell: ContextVar[Callable[[bool], None] | None] = ContextVar("long_work", default=None)


@contextmanager
def long_work() -> Iterator[None]:
    """Around such work, on the engine's thread. Also a decorator."""
    tell, collects = _tell.get() or _nobody, gc.isenabled()
    tell(True)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        tell(False)


def _nobody(begins: bool) -> None:
    return None


@contextmanager
def told(tell: Callable[[bool], None]) -> Iterator[None]:
    """Within, this thread's long work is told: True when it begins, False when it is over."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
