"""Signals to the processes of a server: those to the whole group, and the one that its death sends."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def ignore() -> None:
    """Of the calling process, whose end is its starter's business. By its main thread only."""
    for each in _OF_THE_GROUP:
        signal.signal(each, signal.SIG_IGN)


def go_on_when_orphaned() -> None:
    """The calling process, should it be stopped when its starter is killed, goes on and finds that out.

    Linux sends the signal also when the thread that started it ends: one that is not stopped takes no notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


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
