"""Runs sessions, takes their outcomes in, and tells them as a table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from live import RunFailed

SESSION_SECONDS = 1800


def outcome_of(
    name: str, command: Callable[[], list[str]], folder: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """One session's outcome: client, versions, checks, notes, seconds.

    `command` may install first. A session that ends without an outcome counts as one failed check.
    """
    print(f"== {name}", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        words = command()
        start = time.monotonic()  # without the installation
        done = subprocess.run(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, timeout=SESSION_SECONDS
        )
        outcome = json.loads(done.stdout.strip().splitlines()[-1])
    except (RunFailed, subprocess.TimeoutExpired, ValueError, IndexError) as fault:
        error = f"{type(fault).__name__}: {fault}"
        outcome = {"client": name, "versions": {}, "checks": [{"name": "the session", "error": error}]}
    return {"notes": [], **outcome, "seconds": round(time.monotonic() - start, 1)}


def of_the_server(url: str) -> dict[str, Any]:
    """What /metrics says once all sessions are over: no fault of ours, nothing left behind."""
    start = time.monotonic()
    outcome: dict[str, Any] = {"client": "the server itself", "versions": {}, "notes": [], "seconds": 0.0}
    try:
        lines = [line for line in _read(f"{url}/metrics").splitlines() if not line.startswith("#")]
        version = json.loads(_read(f"{url}/version"))["version"]
    except OSError as fault:
        return {**outcome, "checks": [{"name": "it answers", "error": str(fault)}]}
    faults = [
        line
        for line in lines
        if line.startswith("disco_http_requests_total{") and 'status="5' in line
        if '"/ready"' not in line and not line.endswith(" 0.0")
    ]  # /ready says 503 while the engine loads
    left = [
        line
        for line in lines
        if re.match(r"disco_(requests_(in_flight|running|waiting)|engine_restarts_total) [^0]", line)
    ]
    checks = [
        {"name": "no answer of 500 and above", "error": "; ".join(faults) or None},
        {"name": "nothing in flight, no engine restarted", "error": "; ".join(left) or None},
    ]
    seconds = round(time.monotonic() - start, 1)
    return {**outcome, "versions": {"disco-serve": version}, "checks": checks, "seconds": seconds}


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def failed(outcomes: list[dict[str, Any]]) -> bool:
    """Whether any check failed, or a session had none."""
    return any(not outcome["checks"] or any(c["error"] for c in outcome["checks"]) for outcome in outcomes)


def table(outcomes: list[dict[str, Any]]) -> str:
    """Client, version, checks passed and failed; below, what was noted and what failed."""
    rows = [("client", "version", "passed", "failed", "seconds")]
    below: list[str] = []
    for outcome in outcomes:
        faults = [check for check in outcome["checks"] if check["error"]]
        versions = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
        passed = len(outcome["checks"]) - len(faults)
        rows.append((outcome["client"], versions, str(passed), str(len(faults)), str(outcome["seconds"])))
        below += [f"{outcome['client']}: {note}" for note in outcome["notes"]]
        below += [f"{outcome['client']}: {check['name']}\n    {check['error']}" for check in faults]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), *(["", *below] if below else [])])
