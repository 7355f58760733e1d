"""Small questions about text that the readers of answers share."""

from __future__ import annotations

import json
import re

from server.tools.json_text import JsonText, Status

_SPACE = re.compile(r"\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def held_back(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` may begin with, short of all of it."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def skip_space(text: str, at: int) -> int:
    """The offset of the first character from `at` on that is no white space."""
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def rewritten(raw: str) -> str | None:
    """Arguments that are no object: none at all, or an object inside a string. None if it is neither."""
    value = json.loads(raw)
    if value is None:
        return "{}"
    if not isinstance(value, str):
        return None
    reader = JsonText(0)
    text = value.strip()
    whole = text.startswith("{") and reader.feed(text) is Status.DONE and reader.position == len(text)
    return text if whole and _SURROGATE.search(text) is None else None
