"""What a load generator counted, against what /metrics counted meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from served import metric

COUNTERS = {
    "requests": "disco_requests_total",
    "prompt tokens": "disco_prompt_tokens_total",
    "output tokens": "disco_generated_tokens_total",
    "accepted tokens": "disco_accepted_tokens_total",
}


def counters() -> dict[str, float]:
    """What the server has counted until now."""
    return {name: metric(series) for name, series in COUNTERS.items()}


def run(command: list[str], seconds: float = 300) -> None:
    """A tool of this environment, to its end. Raises AssertionError with the end of what it printed."""
    tool = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [tool, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stdout[-3000:]}"


def assert_agree(before: dict[str, float], told: dict[str, float]) -> None:
    """Everything that the tool counted is what the server counted since `before`, to the token."""
    counted = {name: value - before[name] for name, value in counters().items()}
    assert told and all(value > 0 for name, value in told.items() if name != "accepted tokens"), told
    for name, value in told.items():
        assert value == counted[name], f"{name}: {value} by the tool, {counted[name]} by /metrics"
