"""schemathesis over the OpenAPI page of a live server: no 5xx, nothing that the page does not say.

    python tests/suites/run_schemathesis.py [--url http://127.0.0.1:8000] [--cases 5000] [--seed 1]

Without --url it starts `disco-serve` itself, on a tiny random model. Ends with 1 if a check fails, or
if fewer cases were run than asked for. Needs `schemathesis` beside this Python.

One check is left out: that whatever fits the page's schema is accepted. Some bounds are the model's (its
context, its vocabulary) or lie between fields, and no schema says them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOT_CHECKED = "positive_data_acceptance"
START_SECONDS = 120.0
MAIN = "from server.cli import main; main()"
FLAGS = "--served-model-name tiny --draft self:1 --max-model-len 128 --max-num-seqs 128 --log-level warning"


@contextmanager
def served(python: str) -> Iterator[str]:
    """The address of a server of the tiny model; what it logs is shown at the end if it logged anything."""
    with tempfile.TemporaryDirectory() as directory:
        model, log = Path(directory) / "model", Path(directory) / "log"
        subprocess.run([python, HERE / "tiny_model.py", model], check=True, cwd=ROOT)
        command = [python, "-c", MAIN, "serve", "--target", str(model), "--port", "0", *FLAGS.split()]
        with log.open("w") as out:
            server = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        try:
            yield address(server, log)
        finally:
            server.terminate()
            server.wait(60)
            print(f"the server's log:\n{log.read_text()}")


def address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until the server is ready. Raises RuntimeError if it ends, or takes too long."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if (found := re.search(r" on (http://\S+)", log.read_text())) and ready(found[1]):
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"the server is not ready:\n{log.read_text()}")


def ready(url: str) -> bool:
    try:
        return fetch(f"{url}/ready") is not None
    except OSError:  # not there yet, or 503
        return False


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def run(url: str, cases: int, seed: int) -> int:
    """Runs the suite against `url`. Returns 0 if all checks hold, over at least `cases` cases."""
    page = fetch(f"{url}/openapi.json")
    operations = sum(len(methods) for methods in page["paths"].values())
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        tool = Path(sys.executable).with_name("schemathesis")
        command = [
            tool, "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing",
            "--exclude-checks", NOT_CHECKED, "--max-examples", str(math.ceil(cases / operations)),
            "--seed", str(seed), "--continue-on-failure", "--request-timeout", "300",
            "--suppress-health-check", "all", "--no-color", "--report", "json", "--report-json-path", report,
        ]  # fmt: skip
        outcome = subprocess.run(command, check=False).returncode
        generated = json.loads(report.read_text())["test_cases"]["generated"]
    if generated < cases:
        print(f"{generated} cases were run, {cases} were asked for")
    return outcome or int(generated < cases)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--url", help="a server that runs; default: one is started")
    options.add_argument(
        "--python", default=sys.executable, help="the Python that has disco-serve; default: this"
    )
    options.add_argument("--cases", type=int, default=5000, help="cases to run at least")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    if given.url is not None:
        return run(given.url.rstrip("/"), given.cases, given.seed)
    with served(given.python) as url:
        return run(url, given.cases, given.seed)


if __name__ == "__main__":
    sys.exit(main())
