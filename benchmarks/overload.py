"""Four times more than a server can do: what it still does, for whom, and how fast it refuses the rest.

    python benchmarks/overload.py [--seconds 120] [--json out/overload.json] [-- flags of disco-serve serve]
    python benchmarks/overload.py --url http://127.0.0.1:8000/v1 --streams 16

Without --url a server is started on a free port, with the flags after `--` (default: 16 sequences at once,
4 that may wait). First the capacity, closed loop: as many streams as run at once, for a fourth of --seconds.
Then --factor times the requests a second that these gave, open loop (a Poisson process), for --seconds. Then
the capacity again: other work on the machine must not be taken for the overload's doing.
Goodput is that of answers that came whole: their tokens, by when they ended, from one answer's time after
the begin to the end of the arrivals. Exit code 1 if an aim is missed: goodput of 90 % of the capacity (the
mean of both); 429 in 50 ms at p99; of accepted requests time a token (p50) and end to end (p50, p99) at most
--slack times those at capacity (the worse of both); nothing but answers and 429s.

The load generator runs on the server's machine and competes with it; its own lateness is part of every
latency, and is told, as is the CPU time of the server's processes for each token, if it was started here.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import record
from load_prompts import SHORT
from rich.console import Console
from rich.table import Table

from server.bench.load import Load, Outcome
from server.bench.processes import send
from server.bench.target import Target, TargetError

_FLAGS = ("--max-num-seqs", "16", "--max-queued-requests", "4", "--log-level", "warning")
_START_SECONDS = 600
_REFUSED = "HTTP 429"
GOODPUT, REFUSAL_MS = 0.9, 50.0
"""The aims: share of the capacity, and milliseconds to a 429 at p99."""


@dataclass(frozen=True)
class Part:
    """One part of the run. Times in milliseconds, rates a second; None of nothing."""

    offered: float
    accepted: int
    requests_per_second: float
    tokens_per_second: float
    ttft: tuple[float, float] | None  # p50, p99
    token: tuple[float, float] | None
    whole: tuple[float, float] | None
    refused: int
    refusal: tuple[float, ...] | None  # p50, p99, max
    others: dict[str, int]  # failures that are no 429s, by kind and message
    lag_p99: float | None
    cpu_ms_a_token: float | None


@dataclass(frozen=True)
class Aim:
    """One thing that must hold."""

    what: str
    found: float
    bound: float
    holds: bool


def part_of(outcome: Outcome, seconds: float, ramp: float, cpu: float | None = None) -> Part:
    """What a load of so many seconds gave, its rates from `ramp` seconds on. `cpu`: seconds of the server."""
    records = outcome.records
    begin = min((each.due or each.sent for each in records), default=0.0)
    tokens = sum(each.tokens for each in (*records, *outcome.warmup) if each.error is None)
    good = [each for each in records if each.error is None]
    refused = [each for each in records if each.error == _REFUSED]
    counted = [each for each in good if begin + ramp <= each.ended < begin + seconds]
    span = seconds - ramp
    if span <= 0:
        raise SystemExit(f"one answer takes {ramp:.1f} s: {seconds:g} s are too short to measure anything")
    strange = [each for each in records if each.error not in (None, _REFUSED)]
    others = Counter(f"{each.error}: {each.message[:100]}" for each in strange)
    return Part(
        offered=len(records) / seconds,
        accepted=len(good),
        requests_per_second=len(counted) / span,
        tokens_per_second=sum(each.tokens for each in counted) / span,
        ttft=_two([each.ttft for each in good]),
        token=_two([each.tpot for each in good]),
        whole=_two([each.ended - each.sent for each in good]),
        refused=len(refused),
        refusal=_percentiles([each.ended - each.sent for each in refused], 50, 99, 100),
        others=dict(others),
        lag_p99=None if not outcome.lags else float(np.percentile(outcome.lags, 99)) * 1e3,
        cpu_ms_a_token=None if cpu is None or not tokens else cpu * 1e3 / tokens,
    )


def aims(capacity: Sequence[Part], during: Part, slack: float) -> list[Aim]:
    """What must hold of `during`, the overload."""
    rate = sum(each.tokens_per_second for each in capacity) / len(capacity)
    found = [_at_least("goodput, of capacity", during.tokens_per_second / rate, GOODPUT)]
    if during.refusal is not None:
        found.append(_at_most("429 in ms, p99", during.refusal[1], REFUSAL_MS))
    for name, what, rank in (
        ("token", "time a token", 0),
        ("whole", "end to end", 0),
        ("whole", "end to end", 1),
    ):
        was = [times[rank] for each in capacity if (times := getattr(each, name)) is not None]
        now = getattr(during, name)
        if was and now is not None:
            found.append(
                _at_most(f"{what} at p{(50, 99)[rank]}, of that at capacity", now[rank] / max(was), slack)
            )
    strange = sum(sum(each.others.values()) for each in (*capacity, during))
    strange += sum(each.refused for each in capacity)
    return [*found, _at_most("neither answers nor 429s, or refused at capacity", strange, 0)]


class Server:
    """What is measured: a base URL, and the process if it is ours."""

    def __init__(self, url: str, process: psutil.Process | None = None) -> None:
        self.url, self._process = url, process

    def cpu(self) -> float | None:
        """Seconds that it and its engine have had."""
        if self._process is None:
            return None
        all_of_it = (self._process, *self._process.children(recursive=True))
        return sum(sum(each.cpu_times()[:2]) for each in all_of_it)

    def load(self, load: Load, processes: int, ramp: float | None = None) -> tuple[Part, float]:
        """What it makes of a load, and the time of an answer in seconds, which is `ramp` if that is None."""
        before = self.cpu()
        outcome = send(load, min(processes, load.streams or processes))
        after = self.cpu()
        spent = None if before is None or after is None else after - before
        good = [each.ended - each.sent for each in outcome.records if each.error is None]
        typical = float(np.median(good)) if good else 0.0
        return part_of(outcome, load.seconds or 0.0, typical if ramp is None else ramp, spent), typical


def measure(server: Server, args: argparse.Namespace) -> tuple[list[Part], Part]:
    """Capacity, twice, and overload. Raises TargetError if the server cannot be asked."""
    with Target(server.url, None, 300.0) as target:
        about = target.about(None)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    fields = {"model": about.model, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, **usage}
    streams = _places(about.url) if args.streams is None else args.streams
    base = Load(about.url, "completions", SHORT, fields, seconds=args.seconds)
    closed = replace(base, streams=streams, seconds=args.seconds / 4, warmup=streams)
    before, typical = server.load(closed, args.processes)
    if not before.requests_per_second:
        raise SystemExit("the server answered nothing in time: a longer --seconds, or fewer --tokens")
    rate = args.factor * before.requests_per_second
    during, _ = server.load(replace(base, rate=rate), args.processes, typical)
    after, _ = server.load(closed, args.processes)
    return [before, after], during


def show(capacity: Sequence[Part], during: Part, reached: Sequence[Aim]) -> None:
    """All parts side by side, then the aims."""
    parts = (capacity[0], during, *capacity[1:])
    table = Table("", "capacity", "overload", "capacity again", title="Overload")
    rows: dict[str, Callable[[Part], str]] = {
        "requests/s offered": lambda each: f"{each.offered:.2f}",
        "answers/s": lambda each: f"{each.requests_per_second:.2f}",
        "tokens/s of answers": lambda each: f"{each.tokens_per_second:.1f}",
        "answers": lambda each: str(each.accepted),
        "TTFT ms, p50 and p99": lambda each: _told(each.ttft),
        "ms a token, p50 and p99": lambda each: _told(each.token),
        "end to end ms, p50 and p99": lambda each: _told(each.whole),
        "429s": lambda each: str(each.refused),
        "429 in ms, p50, p99, max": lambda each: _told(each.refusal),
        "others": lambda each: str(each.others or "-"),
        "generator late by ms, p99": lambda each: _told(each.lag_p99),
        "server's CPU ms a token": lambda each: _told(each.cpu_ms_a_token),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, parts))
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    for aim in reached:
        console.print(f"{'ok  ' if aim.holds else 'MISSED'} {aim.what}: {aim.found:.3g} (aim {aim.bound:g})")


@contextlib.contextmanager
def served(flags: Sequence[str]) -> Iterator[Server]:
    """A server of our own, meanwhile. Raises SystemExit if it does not start or end well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(port)]
    process = subprocess.Popen([*command, *flags])
    try:
        _wait(process, f"http://127.0.0.1:{port}/ready")
        yield Server(f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    if code:
        raise SystemExit(f"the server ended with exit code {code}")


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the server does not become ready")


def _places(url: str) -> int:
    text = httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=30).text
    for line in text.splitlines():
        if line.startswith("disco_requests_limit"):
            return int(float(line.split()[-1]))
    raise SystemExit("--streams: how many run at once is not to be read from /metrics")


def _percentiles(seconds: Sequence[float | None], *ranks: float) -> tuple[float, ...] | None:
    known = [each for each in seconds if each is not None]
    return tuple(float(each) * 1e3 for each in np.percentile(known, ranks)) if known else None


def _two(seconds: Sequence[float | None]) -> tuple[float, float] | None:
    found = _percentiles(seconds, 50, 99)
    return None if found is None else (found[0], found[1])


def _told(figures: float | Sequence[float] | None) -> str:
    if figures is None:
        return "-"
    return ", ".join(f"{each:.1f}" for each in ([figures] if isinstance(figures, float) else figures))


def _at_least(what: str, found: float, bound: float) -> Aim:
    return Aim(what, found, bound, found >= bound)


def _at_most(what: str, found: float, bound: float) -> Aim:
    return Aim(what, found, bound, found <= bound)


def main() -> int:
    args = _arguments()
    ours = served(args.flags or _FLAGS)
    with ours if args.url is None else contextlib.nullcontext(Server(args.url)) as server:
        try:
            capacity, during = measure(server, args)
        except TargetError as error:
            raise SystemExit(str(error)) from error
    reached = aims(capacity, during, args.slack)
    show(capacity, during, reached)
    if args.json is not None:
        told = {
            "arguments": {**vars(args), "json": str(args.json)},
            "aims": [asdict(each) for each in reached],
        }
        parts = {"capacity": [asdict(each) for each in capacity], "overload": asdict(during)}
        record.save(args.json, told | parts)
    return 0 if all(each.holds for each in reached) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server's base URL, with /v1")
    parser.add_argument("--streams", type=int, help="of the closed loop; default: what runs at once")
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload (default: 120)")
    parser.add_argument("--factor", type=float, default=4.0, help="times the capacity (default: 4)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--slack", type=float, default=1.5, help="for accepted requests (default: 1.5)")
    parser.add_argument("--processes", type=int, default=1, help="that send (default: 1)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("flags", nargs="*", help="of disco-serve serve, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
