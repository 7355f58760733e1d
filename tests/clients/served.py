"""What every Python session shares: where the server is, checks that are counted, and what /metrics says.

Runs inside each client's own environment, so it needs the standard library alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

ROOT = os.environ.get("SERVED_AT", "http://127.0.0.1:8000")
BASE_URL = f"{ROOT}/v1"
KEY = os.environ.get("SERVED_KEY", "none")
MODEL = os.environ.get("SERVED_MODEL", "smollm2")
WEIGHTS = os.environ.get("SERVED_WEIGHTS", "")
"""The directory of the model's weights and tokenizer; only suites need it."""

QUESTION = "Name three rivers in Europe."
USER: list[Any] = [{"role": "user", "content": QUESTION}]
LONG = "Write a very long story about a river, with many chapters."
LONG_TOKENS = 4000  # minutes on a CPU: that the server is idle soon after says that it was stopped
SPECULATION = {"drafter": "model", "policy": "static", "options": {"sl": 3}}

CITY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TIME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


def tool(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A function as chat completions take it."""
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


WEATHER = tool("get_weather", "The weather of a city now", CITY_SCHEMA)
CLOCK = tool("get_time", "The time in a zone", TIME_SCHEMA)
ASK_WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Rome, in celsius?"}]


def is_city(arguments: dict[str, Any]) -> bool:
    """Whether the arguments fit CITY_SCHEMA."""
    fields = CITY_SCHEMA["properties"]
    return arguments.keys() == fields.keys() and all(
        arguments[name] in field["enum"] for name, field in fields.items()
    )


loop = asyncio.Runner()
"""One event loop for a whole session: clients keep connections that belong to the loop they met first."""


class Session:
    """Checks of one client, each run at once and counted. `packages`: whose versions the table shows."""

    def __init__(self, client: str, *packages: str) -> None:
        self.client = client
        self.versions = {package: version(package) for package in packages}
        self.results: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._only = sys.argv[1:]  # parts of names: run these checks only

    def check(self, topic: str) -> Callable[[Callable[[], None]], None]:
        """Runs the function now. `topic`: plain, streaming, usage, tools, structured, errors, ..."""

        def run(function: Callable[[], None]) -> None:
            name = f"{topic}: {function.__name__}"
            if self._only and not any(part in name for part in self._only):
                return
            start, error = time.monotonic(), None
            try:
                function()
            except Exception as fault:
                frames = traceback.extract_tb(fault.__traceback__)
                ours = [frame for frame in frames if frame.filename.endswith(sys.argv[0])]
                where = f"line {ours[-1].lineno}, {ours[-1].line}: " if ours else ""
                error = f"{where}{type(fault).__name__}: {fault}"[:2000]
            seconds = round(time.monotonic() - start, 2)
            self.results.append({"name": name, "error": error, "seconds": seconds})
            print(f"{'FAILED' if error else 'ok':6} {name} ({seconds} s)", file=sys.stderr, flush=True)
            if error:
                print(f"       {error}", file=sys.stderr, flush=True)

        return run

    def note(self, text: str) -> None:
        """A figure for below the table."""
        self.notes.append(text)

    def finish(self) -> None:
        """Prints the outcome as one line of JSON; exits with 1 if a check failed or none ran."""
        outcome = {
            "client": self.client,
            "versions": self.versions,
            "checks": self.results,
            "notes": self.notes,
        }
        print(json.dumps(outcome), flush=True)
        loop.close()
        sys.exit(0 if self.results and not any(result["error"] for result in self.results) else 1)


def metric(name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"{ROOT}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    assert any(line.startswith(f"# TYPE {name} ") for line in lines), f"/metrics has no {name}"
    found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def busy() -> float:
    """Sequences that the server waits for or the engine runs."""
    return metric("disco_requests_in_flight") + metric("disco_requests_running")


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    """Polls. Raises AssertionError when it still does not hold after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.05)


def assert_at_work() -> None:
    """Something is in flight: what a cancellation is about to stop."""
    wait_until(lambda: busy() > 0, "a request in flight")


def assert_idle() -> None:
    """Nothing is in flight any more, long before LONG_TOKENS could have been made."""
    wait_until(lambda: busy() == 0, "nothing in flight")


def raised(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The exception of that kind that the call raises. Raises AssertionError when it raises none."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}; the answer was {str(answer)[:200]}")
