"""What the server writes to its log, in a format, while a test runs."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.log_writer import set_levels
from server import logs
from server.log_lines import LogFormat, formatter


class Lines:
    """What is logged, in a format."""

    def __init__(self, kind: LogFormat) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(formatter(kind))

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def all(self) -> list[Any]:
        return [json.loads(line) for line in self.text.splitlines()]

    def requests(self) -> list[Any]:
        return [told for told in self.all() if told["logger"] == "server.logs"]

    def request(self) -> Any:
        (told,) = self.requests()
        return told


@contextmanager
def writing() -> Iterator[Callable[[LogFormat], Lines]]:
    """Makes `Lines`, which get all that is logged from then on, from level info."""
    root, before = logging.getLogger(), logging.getLogger().level
    used: list[Lines] = []

    def written(kind: LogFormat) -> Lines:
        used.append(Lines(kind))
        root.addHandler(used[-1].handler)
        root.setLevel(logging.INFO)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # the test's own client
        return used[-1]

    yield written
    root.setLevel(before)
    for lines in used:
        root.removeHandler(lines.handler)


@contextmanager
def configured(level: str, kind: LogFormat) -> Iterator[logging.Handler]:
    """Within it this process logs as a server does; gives the handler that does it."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    logs.configure(level, kind)
    (handler,) = root.handlers
    try:
        yield handler
    finally:
        handler.flush()
        set_levels(logging.INFO)
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        handler.close()
