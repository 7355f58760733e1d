"""Ray Serve on this machine, checked: two CPU replicas of the default pair, 64 streams, one replica killed.

    python deploy/ray/check.py [--json FILE] [--port 8160] [--tokens 64] [--rounds 2]

Needs `pip install -e ".[ray]"`, two cores and some 8 GB of memory. Starts a single server, notes its
texts, then a Ray cluster of its own on ports from --port on. Exit code 0 if everything holds, 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from ray_check import affinity, cluster, streams
from ray_check.cluster import Cluster, Failed
from ray_check.streams import Outcome
from rich.console import Console
from rich.table import Table

_ABORT_SECONDS = 30.0
_MIDDLE = 0.3  # of all chunks of a run: where a replica is killed


@dataclass
class Line:
    """One thing that must hold."""

    what: str
    holds: bool
    found: str


class Check:
    """The steps, in their order; each adds its lines and figures."""

    def __init__(self, model: str, tokens: int, rounds: int) -> None:
        self.bodies = streams.bodies(model, tokens)
        self.model, self._rounds = model, rounds
        self.lines: list[Line] = []
        self.rates: dict[str, dict[str, float]] = {}
        self.figures: dict[str, Any] = {}
        self.texts: list[str] = []
        self.chunks = 0

    def line(self, what: str, holds: bool, found: str) -> None:
        self.lines.append(Line(what, holds, found))
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {found}", file=sys.stderr)

    def measured(self, name: str, url: str, cpu_seconds: Callable[[], float]) -> list[Outcome]:
        """All streams at once, `rounds` times after a warm-up; the best round's rate."""
        asyncio.run(streams.run(url, self.bodies[:8]))
        rates, outcomes = [], []
        for _ in range(self._rounds):
            before = cpu_seconds()
            outcomes = asyncio.run(streams.run(url, self.bodies))
            tokens = max(sum(each.tokens for each in outcomes), 1)
            cpu = (cpu_seconds() - before) / tokens * 1000
            rates.append({"tokens_per_second": streams.throughput(outcomes), "cpu_seconds_per_1000": cpu})
        self.rates[name] = max(rates, key=lambda rate: rate["tokens_per_second"])
        return outcomes

    def reference(self, url: str, cpu_seconds: Callable[[], float]) -> None:
        """Texts and rate of one server without Ray. Raises Failed: nothing could be compared."""
        outcomes = self.measured("single server", url, cpu_seconds)
        if not all(each.whole for each in outcomes):
            raise Failed(f"the single server did not answer all: {_faults(outcomes)}")
        self.texts = [each.text for each in outcomes]
        self.chunks = sum(each.chunks for each in outcomes)

    def rate(self, where: Cluster, replicas: int) -> None:
        where.deploy(replicas)
        name = f"Serve, {replicas} replica{'s' if replicas > 1 else ''}"
        outcomes = self.measured(name, where.url, where.cpu_seconds)
        served = {each.replica for each in outcomes}
        right = self._right(outcomes)
        scraped = set(where.replicas())
        holds = right == len(outcomes) and len(served) == replicas and scraped == served
        found = (
            f"{right} of {len(outcomes)} right, by {len(served)} replica(s), {len(scraped)} of them scraped"
        )
        self.line(f"{name}: all streams whole, text as from a single server", holds, found)

    def _right(self, outcomes: Sequence[Outcome]) -> int:
        return sum(o.whole and o.text == t for o, t in zip(outcomes, self.texts, strict=True))

    def kill(self, where: Cluster) -> None:
        """SIGKILL to one replica's process under 64 streams."""
        victim, port = next(iter(where.replicas().items()))
        process, seen, killed = where.process(port), 0, 0.0

        def told() -> None:
            nonlocal seen, killed
            seen += 1
            if seen == int(self.chunks * _MIDDLE):
                process.kill()
                killed = time.monotonic()

        outcomes = asyncio.run(streams.run(where.url, self.bodies, told))
        lost = [each for each in outcomes if not each.whole]
        clear = [each for each in lost if each.clear_error and each.code == "replica_died"]
        named = {each.replica for each in lost if each.replica}
        self.figures["killed"] = {"lost": len(lost), "mid_stream": sum(each.status == 200 for each in lost)}
        found = f"{len(clear)} of {len(lost)} with code replica_died{_faults(lost)}"
        holds = bool(lost) and len(clear) == len(lost)
        self.line("killed: its streams end with a clear error", holds, found)
        self.line("killed: only its own streams fail", named == {victim}, f"lost by {named}, killed {victim}")
        right, others = self._right(outcomes), len(outcomes) - len(lost)
        self.line(
            "killed: all others finish with the right text", right == others > 0, f"{right} of {others}"
        )
        self._returned(where, victim, killed)

    def engine(self, where: Cluster) -> None:
        """SIGKILL to one replica's engine: the replica starts it again by itself, as a server does."""
        victim, port = next(iter(where.replicas().items()))
        engine, seen = max(where.process(port).children(), key=lambda each: each.memory_info().rss), 0

        def told() -> None:
            nonlocal seen
            seen += 1
            if seen == int(self.chunks * _MIDDLE):
                engine.kill()

        outcomes = asyncio.run(streams.run(where.url, self.bodies, told))
        lost = [each for each in outcomes if not each.whole]
        clear = [each for each in lost if each.clear_error and each.code == "engine_unavailable"]
        where.wait(lambda: len(where.replicas()) == 2, "engine after its death")
        holds = bool(lost) and len(clear) == len(lost) and victim in where.replicas()
        found = (
            f"{len(clear)} of {len(lost)} with code engine_unavailable; the replica stays and is ready again"
        )
        self.line(
            "an engine killed: clear errors, and it is started again",
            holds,
            found if holds else _faults(lost),
        )

    def _returned(self, where: Cluster, victim: str, killed: float) -> None:
        def back() -> bool:
            there = where.replicas()
            return len(there) == 2 and victim not in there

        where.wait(back, "second replica after the kill")
        seconds = time.monotonic() - killed
        self.figures["killed"]["back_after_seconds"] = round(seconds, 1)
        outcomes = asyncio.run(streams.run(where.url, self.bodies))
        right, served = self._right(outcomes), {each.replica for each in outcomes}
        found = f"within {seconds:.0f} s of the kill; then {right} of 64 right, by {len(served)} replicas"
        holds = right == 64 and served == set(where.replicas())
        self.line("killed: the replica comes back and serves", holds, found)

    def leave(self, where: Cluster) -> None:
        """A client that leaves, in the middle of a stream and before an answer in one body."""
        for chunks, how in ((3, "a stream"), (0, "an answer in one body")):
            long = {**self.bodies[0], "max_tokens": 1500}
            before = {port: self._counts(where, port) for port in where.replicas().values()}
            asyncio.run(streams.leave_early(where.url, long, chunks))

            def aborted(before: dict[int, tuple[float, float, float]] = before) -> bool:
                now = {port: self._counts(where, port) for port in before}
                gained = sum(now[port][0] - before[port][0] for port in before)
                return gained == 1 and not any(running for _, running, _ in now.values())

            what = f"a client that leaves {how} aborts the generation in the engine"
            try:
                seconds = where.wait(aborted, "abort in the engine", _ABORT_SECONDS)
            except Failed as error:
                self.line(what, False, str(error))
                continue
            spent = sum(self._counts(where, port)[2] - before[port][2] for port in before)
            self.line(
                what, spent < 1500, f"after {seconds:.1f} s, having generated {spent:.0f} of 1500 tokens"
            )

    def _counts(self, where: Cluster, port: int) -> tuple[float, float, float]:
        return (
            where.metric(port, "disco_requests_total", outcome="abort"),
            where.metric(port, "disco_requests_running"),
            where.metric(port, "disco_generated_tokens_total"),
        )

    def prefixes(self, where: Cluster) -> None:
        """Turns of a conversation share a replica, whose cache they hit; a prefix that all share spreads."""
        name = "disco_prefix_cache_hit_tokens_total"
        before = sum(where.metric(port, name) for port in where.replicas().values())
        homes = affinity.conversations(where.url, self.model, count=12, turns=3)
        hits = sum(where.metric(port, name) for port in where.replicas().values()) - before
        one = sum(len(set(each)) == 1 for each in homes)
        self.figures["affinity"] = {"conversations": homes, "prefix_hit_tokens": hits}
        both = len({each[0] for each in homes}) == 2
        found = f"{one} of {len(homes)}; both replicas used: {both}; {hits:.0f} prompt tokens from the cache"
        holds = one == len(homes) and both and hits > 0
        self.line("all turns of a conversation go to one replica", holds, found)
        hot = [{**body, "prompt_cache_key": "shared"} for body in self.bodies[:32]]
        outcomes = asyncio.run(streams.run(where.url, hot))
        counts = [sum(o.replica == each for o in outcomes) for each in where.replicas()]
        self.line("a prefix that all share does not fill one replica", min(counts) >= 8, f"{counts} of 32")

    def drain(self, where: Cluster) -> None:
        """Down to one replica under open streams: the one that goes ends its own first."""

        async def under_way() -> list[Outcome]:
            streaming = asyncio.create_task(streams.run(where.url, self.bodies))
            await asyncio.sleep(2.0)
            await asyncio.to_thread(where.deploy, 1)
            return await streaming

        outcomes = asyncio.run(under_way())
        right, served = self._right(outcomes), {each.replica for each in outcomes}
        found = f"{right} of 64 right, by {len(served)} replicas{_faults(outcomes)}"
        holds = right == 64 and len(served) == 2
        self.line("scaled down under load: every open stream finishes", holds, found)

    def refusals(self, where: Cluster) -> None:
        bad = httpx.post(f"{where.url}/v1/completions", json={"model": self.model, "prompt": 1.5}, timeout=60)
        ok = bad.status_code == 400 and "error" in bad.json()
        self.line("bad input is answered by the app, through Serve", ok, f"{bad.status_code} {bad.text[:60]}")
        metrics = httpx.get(f"{where.url}/metrics", timeout=60)
        self.line(
            "/metrics of a random replica is refused", metrics.status_code == 404, str(metrics.status_code)
        )

    def table(self) -> None:
        table = Table("", "what", "found", title="Ray Serve", box=None)
        for line in self.lines:
            table.add_row("ok" if line.holds else "FAIL", line.what, line.found)
        rates = Table("throughput, 64 streams", "tokens/s", "CPU s / 1000 tokens", box=None)
        for name, rate in self.rates.items():
            rates.add_row(name, *(f"{figure:.1f}" for figure in rate.values()))
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print(table)
        console.print(rates)


def _faults(outcomes: Sequence[Outcome]) -> str:
    faults = {f"{o.status} {o.code or o.broken or 'cut short'}" for o in outcomes if not o.whole}
    return f"; {', '.join(sorted(faults))}" if faults else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--port", type=int, default=8160, help="20 ports from here on are taken")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=2, help="of each measurement; the best one counts")
    parser.add_argument("--folder", type=Path, help="keep Ray's logs here; a short path")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    check = Check("smollm2", options.tokens, options.rounds)
    try:
        with cluster.single_server(options.port) as (url, cpu_seconds):
            check.reference(url, cpu_seconds)
        with cluster.cluster(options.port, cpus=2, folder=options.folder) as where:
            check.rate(where, 1)
            check.rate(where, 2)
            for step in (check.refusals, check.leave, check.prefixes, check.engine, check.kill, check.drain):
                step(where)
    except Failed as error:
        check.line("the check ran to its end", False, str(error))
    check.table()
    holds = all(line.holds for line in check.lines)
    if options.json:
        lines = [asdict(each) for each in check.lines]
        busy = [round(each, 1) for each in os.getloadavg()]  # others on the machine show here
        about = {"ray": version("ray"), "tokens_each": options.tokens, "load_average": busy}
        result = {"holds": holds, **about, "rates": check.rates, "lines": lines}
        options.json.write_text(json.dumps({**result, **check.figures}, indent=2) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
