"""Standard streams that a process was started without."""

from __future__ import annotations

import os
import sys


def open_missing() -> None:
    """Gives /dev/null to stdin, stdout and stderr where they are closed. Else the next file that is opened
    takes their number, gets what libraries print there, and is closed in processes that are started."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        file = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        os.set_inheritable(file, file == number)
        stream = open(file, "w" if number else "r", encoding="utf-8")  # noqa: SIM115  as long as the process
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
