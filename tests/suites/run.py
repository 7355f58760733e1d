"""Suites that others wrote, each in an environment of its own, against one live server.

    python tests/suites/run.py [SUITE ...]       all suites, or those whose names are given

lm-eval scores and generates like its own hf backend; guidellm and aiperf count what /metrics counts;
schemathesis finds nothing that the OpenAPI page does not say.
Installs from PyPI into out/suites/. Prints a table; exits with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
from live import ROOT, RunFailed, python_environment, serving
from outcomes import failed, of_the_server, outcome_of, table

from engine.models.load import resolve

HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "suites"
SERVED = ("lm_eval", "guidellm", "aiperf")
SUITES = (*SERVED, "schemathesis")  # the last brings a server of its own


def command(suite: str) -> list[str]:
    """How a suite is started; installs it first. Raises RunFailed."""
    requirements = HERE / "requirements" / f"{suite}.txt"
    python = python_environment(OUT / suite, requirements, with_project=suite == "lm_eval")
    return [str(python), str(HERE / f"with_{suite}.py")]


def schemathesis(cases: int) -> dict[str, Any]:
    """Its outcome as one check. What it found is in its log."""
    start, log = time.monotonic(), OUT / "schemathesis.log"
    print(f"== schemathesis, {cases} cases; {log}", file=sys.stderr, flush=True)
    outcome: dict[str, Any] = {"client": "schemathesis", "versions": {}, "notes": [], "seconds": 0}
    try:
        python = python_environment(OUT / "schemathesis", HERE / "requirements" / "schemathesis.txt")
    except RunFailed as fault:
        return {**outcome, "checks": [{"name": "installation", "error": str(fault)}]}
    words = [python, HERE / "run_schemathesis.py", "--python", sys.executable, "--cases", str(cases)]
    with log.open("w") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    version = subprocess.run([python.with_name("schemathesis"), "--version"], capture_output=True, text=True)
    error = log.read_text()[-3000:] if done.returncode else None
    return {
        **outcome,
        "versions": {"schemathesis": version.stdout.split()[-1]},
        "checks": [{"name": f"{cases} cases over the OpenAPI page", "error": error}],
        "notes": re.findall(r"Test cases:\n(?:.+\n)+", log.read_text()),
        "seconds": round(time.monotonic() - start, 1),
    }


def served_suites(suites: list[str]) -> list[dict[str, Any]]:
    """The outcomes of the suites that share one server. Raises RunFailed."""
    if not suites:
        return []
    with serving(OUT / "server.log") as served:
        paths = f"{HERE}:{HERE.parent / 'clients'}"
        weights = {"PYTHONPATH": paths, "SERVED_WEIGHTS": str(resolve(served.model))}
        environment = {**served.environment(), **weights}
        outcomes = [outcome_of(suite, partial(command, suite), HERE, environment) for suite in suites]
        return [*outcomes, of_the_server(served.url)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--cases", type=int, default=5000, help="of schemathesis, at least")
    arguments = parser.parse_args()
    suites = arguments.suites or list(SUITES)
    if unknown := set(suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = served_suites([suite for suite in suites if suite in SERVED])
    except RunFailed as fault:
        print(fault, file=sys.stderr)
        return 1
    if "schemathesis" in suites:
        outcomes.append(schemathesis(arguments.cases))
    (OUT / "results.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    print(table(outcomes))
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())
