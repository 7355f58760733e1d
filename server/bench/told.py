"""What others tell, checked where it is read: a server's figures, its words, and what can be sent to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from server.log_lines import one_line

MOST = 10**9
"""The largest count that is believed."""
LONGEST_TIMEOUT = 86_400.0
_WORDS = ("policy", "drafter")
_COUNTS = ("iterations", "drafted", "accepted")
_MEANS = ("mean_emitted", "mean_sl")


class BadFigure(ValueError):
    """A server's figure that cannot be one; the message names it."""


def count_of(told: Mapping[str, Any] | None, name: str) -> int | None:
    """A count; None where it is not told. Raises BadFigure."""
    value = None if told is None else told.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise BadFigure(f"{name} is no count of 0 to {MOST}")
    return value


def speculation_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a server tells of its drafts, without what is not known here. Raises BadFigure."""
    found: dict[str, Any] = {name: told[name] for name in _WORDS if isinstance(told.get(name), str)}
    found |= {name: count for name in _COUNTS if (count := count_of(told, name)) is not None}
    for name in _MEANS:
        if (mean := told.get(name)) is not None:
            if isinstance(mean, bool) or not isinstance(mean, int | float) or not 0 <= mean <= MOST:
                raise BadFigure(f"{name} is no number of 0 to {MOST}")
            found[name] = float(mean)
    return found


def check_sending(timeout: float, api_key: str | None) -> None:
    """Raises ValueError, which never has the key in it."""
    if not (math.isfinite(timeout) and 0 < timeout <= LONGEST_TIMEOUT):
        raise ValueError(f"timeout must be over 0 and at most {LONGEST_TIMEOUT:.0f} seconds, not {timeout}")
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise ValueError("the API key has characters that no header can hold, or none at all")


def without_key(text: str, api_key: str | None) -> str:
    """What a server answered, which may repeat the key. Shorter ones ("none", "EMPTY") are no secret."""
    return text.replace(api_key, "(the API key)") if api_key is not None and len(api_key) >= 8 else text


def without_userinfo(url: str) -> str:
    """A URL as it may be shown: without the name and the password before its host."""
    return one_line(re.sub(r"^([A-Za-z][\w+.-]*://)?.*@", r"\1", url, flags=re.DOTALL))
