"""How a log record is written: a line of text, or a line of JSON. What a client says forges neither."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, Literal

from server.record import current

LogFormat = Literal["text", "json"]

_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@+-]+")
_WORD = re.compile(r"[a-z_]+")
_IN_MESSAGE = ("method", "path", "status")  # of a request: its message begins with them


def formatter(kind: LogFormat) -> logging.Formatter:
    return JsonLines() if kind == "json" else TextLines()


class TextLines(logging.Formatter):
    """Time, level, logger, [request id], message, then name=value. A traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        ident = quoted(current().request_id)
        head = f"{self.formatTime(record)} {record.levelname} {record.name} [{ident}] "
        fields = getattr(record, "fields", {})
        words = [f"{name}={_value(value)}" for name, value in fields.items() if name not in _IN_MESSAGE]
        line = " ".join([head + one_line(record.getMessage()), *words])
        return "\n    ".join([line, *(one_line(more) for more in _more(self, record).splitlines())])


class JsonLines(logging.Formatter):
    """One JSON object in ASCII: time (UTC), level, logger, message, request_id, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        of = current()
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": None if of.request_id == "-" else of.request_id,
            "trace_id": of.trace_id,
            "span_id": of.span_id,
            "exception": _more(self, record) or None,
        }
        told = {name: value for name, value in told.items() if value is not None}
        fields = getattr(record, "fields", {})
        return json.dumps(told | {name: _rounded(value) for name, value in fields.items()})


def quoted(text: str) -> str:
    """A client's word as one word of a line: as it is if it is plain, else as a JSON string in ASCII."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def one_line(text: str) -> str:
    """Without characters that could begin a line, or move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _more(writer: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [writer.formatException(record.exc_info)] if record.exc_info else []
    parts += [writer.formatStack(record.stack_info)] if record.stack_info else []
    return "\n".join(parts)


def _value(value: Any) -> str:
    value = _rounded(value)
    if isinstance(value, list) and all(_WORD.fullmatch(item) for item in value):
        return ",".join(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
