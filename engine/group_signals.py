"""Signals that may reach a server's whole process group: its processes leave them to the server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore() -> None:
    """Of the calling process, whose end is its starter's business. By its main thread only."""
    for each in _OF_THE_GROUP:
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """A process started herein, by this thread, is deaf to them from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
    try:
        resource_tracker.ensure_running()  # else `Process.start` starts it, and that lifts the block
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
