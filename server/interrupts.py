"""Ctrl-C where Python would print a traceback, or a library would take it for a fault of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit code, as of a shell


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Within, SIGINT ends the process without a word: for imports, while there is nothing to clear up. An
    exception there would be a traceback, or be lost in a module that takes it for a failed import."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's business
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(error: BaseException) -> bool:
    """Whether the error is what somebody made of a KeyboardInterrupt."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, KeyboardInterrupt):
        inner = inner.__cause__ or inner.__context__
    return inner is not None
