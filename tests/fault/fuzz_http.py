"""Raw sockets against a live server: garbage, broken requests, odd JSON, bytes that are no text.

    python tests/fault/fuzz_http.py [--requests 20000] [--seed 1] [--at-once 16]

Starts `disco-serve` on a tiny random model, behind a key. Every input is made from the seed. No answer may be
a 5xx (505 apart: a version of HTTP that is not spoken), hold a traceback, or be an error that is not in
OpenAI's shape; nothing may hang; good requests among them get 200; afterwards the server answers as before,
its engine was never restarted, and its log tells of no error. Prints counts; exits with 1 on any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
from fault.fuzzing.exchange import Told, fuzz
from fault.fuzzing.inputs import Inputs
from live import Served, serving
from suites.tiny_model import make

FLAGS = "--served-model-name tiny --draft self:1 --max-model-len 128 --read-seconds 2 --log-level warning"
_BAD_LOG = ("Traceback", " ERROR ", "Exception")


def control(served: Served) -> str:
    """A greedy text: the same before and after."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 16, "temperature": 0}
    headers = {"authorization": f"Bearer {served.key}"}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)
    return str(answer.raise_for_status().json()["choices"][0]["text"])


def after(served: Served, before: str, log: Path) -> list[str]:
    """What is wrong with the server, now that all was sent."""
    faults = []
    if control(served) != before:
        faults.append("the server gives another text than before")
    metrics = httpx.get(f"{served.url}/metrics").text
    if "disco_engine_restarts_total 0.0" not in metrics:
        faults.append("the engine was restarted")
    for name in ("disco_requests_in_flight", "disco_requests_running", "disco_kv_blocks_used"):
        if f"\n{name} 0.0" not in metrics:
            faults.append(f"{name} is not 0, though nobody asks any more")
    faults += [
        f"the log: {line}" for line in log.read_text().splitlines() if any(b in line for b in _BAD_LOG)
    ]
    return faults


def show(told: Told, seconds: float) -> None:
    sent = sum(told.kinds.values())
    print(f"{sent} inputs in {seconds:.0f} s ({sent / seconds:.0f}/s)")
    print("kinds    ", ", ".join(f"{kind} {count}" for kind, count in sorted(told.kinds.items())))
    print("answers  ", ", ".join(f"{status}: {count}" for status, count in sorted(told.statuses.items())))
    print(f"closed without an answer {told.silent}, clients that left {told.left}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model, log = Path(directory) / "model", Path(directory) / "log"
        make(model)
        with serving(log, "--target", str(model), *FLAGS.split()) as served:
            before, start = control(served), time.monotonic()
            address = urlsplit(served.url)
            inputs = Inputs(arguments.seed, served.key, "tiny")
            asked = fuzz(
                address.hostname or "", address.port or 0, inputs, arguments.requests, arguments.at_once
            )
            told = asyncio.run(asked)
            show(told, time.monotonic() - start)
            time.sleep(2)  # for what was aborted to end
            faults = told.faults + after(served, before, log)
        for fault in faults[:20]:
            print(f"FAULT {fault}")
        print(f"{len(faults)} faults")
        return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
