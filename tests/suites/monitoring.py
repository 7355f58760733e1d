"""Every query of deploy/ against a real Prometheus that reads a real server under load.

    python tests/suites/monitoring.py [--out FOLDER]

Needs `prometheus` and `promtool` (Debian: apt-get install prometheus). Demands of each panel a number, and
one other than 0 where that is not listed below; of each recording rule a number; of each alert a number from
every part of its condition; that the alert on restarts fires, since two were made; and that promtool takes
configuration, rules, their unit tests and the live /metrics. Prints a table; exits with 1 on any gap.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
from live import ROOT, RunFailed, Served, serving
from monitoring_load import RESTARTS, bench_all, kill_engine, provoke
from monitoring_queries import PROMETHEUS, Query, filled, panel_queries, rule_queries, variables

SCRAPE_SECONDS = 1
SERVER = ("--max-model-len", "512", "--kv-blocks", "40", "--threads", "1")  # blocks that do not suffice
FIRES = "DiscoEngineRestarting"


@dataclass(frozen=True)
class Found:
    """What became of one check. `gap`: what is missing, or None."""

    kind: str
    where: str
    told: str
    gap: str | None = None


@contextmanager
def prometheus(served: Served, out: Path) -> Iterator[httpx.Client]:
    """A Prometheus with our configuration, but for the address and the interval. Raises RunFailed."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config["rule_files"] = [str(PROMETHEUS / each) for each in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [served.url.removeprefix("http://")]}]
    (out / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.rmtree(out / "tsdb", ignore_errors=True)
    address = f"127.0.0.1:{_free_port()}"
    command = ["prometheus", f"--config.file={out}/prometheus.yml", f"--storage.tsdb.path={out}/tsdb",
               f"--web.listen-address={address}"]  # fmt: skip
    with (out / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
            _wait_for(client, process)
            yield client
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    for _ in range(150):
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RunFailed("prometheus does not start; see prometheus.log")


def promtool(*words: str, given: str | None = None) -> Found:
    """One run of it; anything but 0 is a gap."""
    done = subprocess.run(["promtool", *words], input=given, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    name = " ".join(word for word in words if "/" not in word)
    return Found("promtool", name, f"exit code {done.returncode}", said if done.returncode else None)


def of_files() -> Iterator[Found]:
    """What promtool says of what lies in deploy/prometheus."""
    rules, tests = (sorted(map(str, (PROMETHEUS / name).glob("*.yml"))) for name in ("rules", "tests"))
    yield promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    yield promtool("check", "rules", *rules)
    yield promtool("test", "rules", *tests)


def of_metrics(served: Served) -> Found:
    """What promtool says of the live /metrics."""
    text = httpx.get(f"{served.url}/metrics", trust_env=False).text
    found = promtool("check", "metrics", given=text)
    lines = len(text.splitlines())
    return (
        found
        if lines > 500
        else Found("promtool", "check metrics", f"{lines} lines", "nearly nothing is told")
    )


class Asked:
    """Asks over the whole time of the load, from `start` (time.time) until now."""

    def __init__(self, client: httpx.Client, start: float) -> None:
        self._client, self._start, self._end = client, start, time.time()
        span = f"{math.ceil(self._end - start)}s"
        self.values = {"__rate_interval": f"{8 * SCRAPE_SECONDS}s", "__range": span}
        for name, asked in variables().items():
            chosen = (re.escape(value) for value in self._choices(asked))
            self.values[name] = "|".join(chosen).replace("\\", "\\\\")  # it stands in quotation marks

    def _choices(self, asked: str) -> list[str]:
        metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
        return list(self._get(f"label/{label}/values", {"match[]": metric})["data"])

    def _get(self, path: str, words: dict[str, str]) -> dict[str, Any]:
        return dict(self._client.get(f"/api/v1/{path}", params=words).json())

    def choices(self) -> Iterator[Found]:
        """Whether there is anything to choose from."""
        for name in variables():
            yield Found("variable", name, self.values[name], None if self.values[name] else "no value")

    def query(self, query: Query) -> Found:
        """Its numbers; a panel wants one other than 0, too."""
        step = max(1.0, (self._end - self._start) / 1000)
        words = {"query": filled(query.expr, self.values), "start": str(self._start), "end": str(self._end),
                 "step": str(step)}  # fmt: skip
        answer = self._get("query_range", words)
        if answer["status"] != "success":
            return Found(query.kind, query.where, words["query"], answer["error"])
        series = answer["data"]["result"]
        numbers = [
            number for each in series for _, text in each["values"] if math.isfinite(number := float(text))
        ]
        told = f"{len(series)} series, {len(numbers)} numbers"
        if numbers:
            told += f", {min(numbers):.4g} to {max(numbers):.4g}"
        gap = None if numbers else "no number"
        if query.kind == "panel" and numbers and not any(numbers):
            gap = "nothing but 0"
        return Found(query.kind, query.where, told, gap)


def of_rules(client: httpx.Client) -> Iterator[Found]:
    """Whether Prometheus evaluates each rule, and whether the alert fires that has cause to."""
    groups = client.get("/api/v1/rules").json()["data"]["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        gap = None if rule["health"] == "ok" else rule.get("lastError") or rule["health"]
        yield Found("rule", rule["name"], rule.get("state", rule["health"]), gap)
        if rule["name"] == FIRES and rule["state"] != "firing":
            yield Found("rule", rule["name"], rule["state"], f"does not fire after {RESTARTS} restarts")


def live(out: Path) -> Iterator[Found]:
    """Everything that needs a server. Raises RunFailed."""
    with serving(out / "server.log", *SERVER) as served, prometheus(served, out) as client:
        start = time.time()
        time.sleep(3 * SCRAPE_SECONDS)
        bench_all(served, out)
        provoke(served)
        for _ in range(RESTARTS):
            kill_engine(served)
        provoke(served)
        time.sleep(5 * SCRAPE_SECONDS)  # a scrape, and rules that follow rules
        asked = Asked(client, start)
        yield of_metrics(served)
        yield from asked.choices()
        yield from map(asked.query, [*panel_queries(), *rule_queries()])
        yield from of_rules(client)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "monitoring", help="for logs and the table"
    )
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if missing := [name for name in ("prometheus", "promtool") if shutil.which(name) is None]:
        print(f"{' and '.join(missing)} not found; Debian: apt-get install prometheus", file=sys.stderr)
        return 1
    found: list[Found] = []
    try:
        for each in chain(of_files(), live(out)):
            found.append(each)
    except RunFailed as fault:
        found.append(Found("run", "the run itself", "", str(fault)))
    table = "\n".join(f"{each.kind:9} {each.where:52} {each.gap or 'ok':16} {each.told}" for each in found)
    gaps = sum(each.gap is not None for each in found)
    table += f"\n{len(found)} checks, {gaps} gaps"
    (out / "table.txt").write_text(table + "\n")
    print(table)
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
