"""The log goes to stderr by a thread of its own: whoever logs waits for nobody who reads it."""

from __future__ import annotations

import io
import logging
import os
import queue
import select
import sys
import threading
from typing import Any

_OURS = ("server", "engine", "disco")  # loggers, with all below them
_LINES = 10_000  # that wait to be written
_BYTES = 64 << 20  # of these lines; one more may exceed it
_PATIENCE = 2.0  # seconds that the end of a process waits for its log to be read


def configure(level: int, formatter: logging.Formatter | None) -> None:
    """From now on this process logs to stderr, warnings too, as `formatter` writes lines; None: as text.
    What else it prints there goes the same way.
    """
    set_levels(level)
    logging.captureWarnings(True)
    if sys.__stderr__ is None:  # the process was started without one
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
        return
    handler = LineHandler(sys.__stderr__.fileno(), sys.__stderr__.encoding)
    handler.setFormatter(formatter or logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    if sys.stderr is sys.__stderr__:  # else somebody else wants what is printed
        sys.stderr = io.TextIOWrapper(
            _Printed(handler), handler.encoding, "backslashreplace", line_buffering=True
        )


def set_levels(level: int) -> None:
    """Below info only our own loggers tell anything: others tell there what clients say."""
    logging.getLogger().setLevel(max(level, logging.INFO))
    for name in _OURS:
        logging.getLogger(name).setLevel(level if level < logging.INFO else logging.NOTSET)


class LineHandler(logging.Handler):
    """Writes lines to a file descriptor, in order. Those that find too many waiting, or cannot be written,
    are lost; once it goes on, a line says how many. A forked process begins with none.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        super().__init__()
        self.fd, self.encoding = fd, encoding
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        # Both may be entered again by the same thread: what the garbage collector ends may log.
        self._guard = threading.RLock()
        self._queue: queue.SimpleQueue[bytes | int | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._bytes = self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            line = self.format(_unfit(record))
        self.write(f"{line}\n".encode(self.encoding, "backslashreplace"))

    def write(self, line: bytes) -> None:
        """Returns at once."""
        if self._pid != os.getpid():
            self._begin()
        with self._guard:
            if self._queue.qsize() >= _LINES or self._bytes >= _BYTES:
                self._lost += 1
                return
            self._tell_loss()
            self._bytes += len(line)
            self._queue.put(line)
            if self._thread is None:
                self._start()

    def flush(self) -> None:
        """Waits until all is written, for some seconds at most."""
        if self._pid != os.getpid() or self._thread is None:
            return
        with self._guard:
            self._tell_loss()
            done = threading.Event()
            self._queue.put(done)
        done.wait(_PATIENCE)

    def close(self) -> None:
        """What waits is still written. A line after it starts a thread again."""
        if self._pid == os.getpid():
            with self._guard:
                self._queue.put(None)
                self._queue, self._thread = queue.SimpleQueue(), None
        super().close()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, args=(self._queue,), name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there is no room for one, or the interpreter ends
            return
        self._thread = thread

    def _tell_loss(self) -> None:
        if self._lost:
            self._queue.put(self._lost)
            self._lost = 0

    def _run(self, waiting: queue.SimpleQueue[bytes | int | threading.Event | None]) -> None:
        while (item := waiting.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            data, lines = (self._loss(item), item) if isinstance(item, int) else (item, 1)
            written = _written(self.fd, data)
            with self._guard:
                if item is data:
                    self._bytes -= len(data)
                if written:
                    self._tell_loss()
                else:  # not told before something can be written
                    self._lost += lines

    def _loss(self, lines: int) -> bytes:
        said = "%d lines of the log are lost: they could not be written in time"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, said, (lines,), None)
        return f"{self.format(record)}\n".encode(self.encoding, "backslashreplace")


class _Printed(io.RawIOBase):
    """What is printed to stderr, by whomever, as lines among those of the log."""

    def __init__(self, handler: LineHandler) -> None:
        self._handler = handler

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handler.fd

    def isatty(self) -> bool:
        return os.isatty(self._handler.fd)

    def write(self, data: Any) -> int:
        self._handler.write(bytes(data))
        return len(data)


def _written(fd: int, data: bytes) -> bool:
    """Waits for as long as it takes. False: the reader is gone, the disk is full, or the like."""
    left = memoryview(data)
    try:
        while left:
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:  # whoever shares it has made it so
                select.select([], [fd], [])
    except OSError:
        return False
    return True


def _unfit(record: logging.LogRecord) -> logging.LogRecord:
    """In place of a record whose message and arguments do not fit. It tells none of them."""
    where = (record.pathname, record.lineno)
    said = "a log record of %s:%d cannot be written"
    return logging.LogRecord(record.name, logging.ERROR, *where, said, where, sys.exc_info())
