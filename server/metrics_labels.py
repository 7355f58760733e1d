"""Constant labels of all metrics: `--metrics-label`."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_TAKEN = {
    *("route", "status", "outcome", "reason", "policy", "drafter", "position", "phase", "decision"),
    *("verdict", "target", "draft", "dtype", "device", "version", "le", "model_name", "finished_reason"),
}


def constant_labels(given: Sequence[str]) -> dict[str, str]:
    """Labels from NAME=VALUE each. Raises ValueError for what Prometheus or our metrics could not bear."""
    labels: dict[str, str] = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not value:
            raise ValueError(f"{each!r} is not NAME=VALUE")
        if not value.isprintable():
            raise ValueError(f"the value of label {name!r} is not printable")
        if not _LABEL.fullmatch(name):
            raise ValueError(f"{name!r} is not a label's name: letters, digits and _, not a digit first")
        if name in _TAKEN:
            raise ValueError(f"the label {name!r} is one of our metrics' own")
        if name in labels:
            raise ValueError(f"the label {name!r} is given twice")
        labels[name] = value
    return labels
