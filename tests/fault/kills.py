"""The engine's process is killed again and again under load: does the server answer each time, and does
nothing pile up?

    python tests/fault/kills.py [--kills 100] [--streams 16] [--scripted] [--json out/faults/kills.json]

Prints how many answers came after each kill and what the server's process holds before and after. Exits with
1 if a request was answered as none should be, or anything grew.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from record import save

if TYPE_CHECKING:  # it imports all of a server, which the engine's process would import with this file
    from ground import Ground, Told


@dataclass
class Held:
    """What this process, which is the server's, holds while nobody asks it anything."""

    files: int
    processes: int
    zombies: int
    shared_memory: int  # segments in /dev/shm
    folders: int  # of sockets, in the temporary directory
    sockets: int  # in those
    threads: int
    kv_blocks_used: float
    memory_mib: float


@dataclass
class Report:
    kills: int
    streams: int
    in_flight: int = 0
    told_so: int = 0
    finished: int = 0
    lost: list[str] = field(default_factory=list)
    unanswered: int = 0  # kills after which no new request was answered
    recovery_seconds: list[float] = field(default_factory=list)
    before: Held | None = None
    after: Held | None = None

    def failures(self) -> list[str]:
        """What does not hold."""
        assert self.before is not None and self.after is not None
        found = [*self.lost] + [f"{self.unanswered} kills left no server"] * bool(self.unanswered)
        for name in ("files", "processes", "zombies", "shared_memory", "folders", "sockets", "threads"):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if after > before:
                found.append(f"{name} grew from {before} to {after}")
        if self.after.kv_blocks_used:
            found.append(f"{self.after.kv_blocks_used:g} KV blocks are used and nobody is served")
        return found


async def kill_again_and_again(kills: int, streams: int, scripted: bool = False) -> Report:
    """The whole run. `scripted`: an engine that only counts, and so starts in no time."""
    from ground import ground

    report = Report(kills, streams)
    async with ground(_prompts(streams), scripted=scripted) as here:
        await _kill(here, report, streams, counted=False)  # what is made once is made by now
        report.before = await _held(here)
        for number in range(kills):
            await _kill(here, report, streams)
            if sys.stderr.isatty() or number % 10 == 9:
                print(f"{number + 1} of {kills} kills", file=sys.stderr, flush=True)
        report.after = await _held(here)
    return report


def _prompts(streams: int) -> list[str]:
    return [f"client number {i} says" for i in range(streams)]


async def _kill(here: Ground, report: Report, streams: int, counted: bool = True) -> None:
    asked = [asyncio.create_task(here.ask(prompt, stream=True)) for prompt in _prompts(streams)]
    await asyncio.sleep(0.2 + 0.02 * (len(report.recovery_seconds) % 20))  # in every phase of a request
    restarts = here.engine.restarts
    if here.engine.pid is not None:
        os.kill(here.engine.pid, signal.SIGKILL)
    told: list[Told] = await asyncio.gather(*asked)
    begin = time.monotonic()
    await here.until(lambda: here.engine.restarts > restarts)
    try:
        await here.recovered()
    except TimeoutError:
        report.unanswered += 1
    if counted:
        report.recovery_seconds.append(time.monotonic() - begin)
        report.in_flight += len(told)
        report.told_so += sum(each.code == "engine_unavailable" for each in told)
        report.finished += sum(each.code is None and each.lost is None for each in told)
        report.lost += [each.lost for each in told if each.lost is not None]
        odd = {each.code for each in told} - {None, "engine_unavailable"}
        report.lost += [f"an error of code {code}" for code in odd]


async def _held(here: Ground) -> Held:
    await asyncio.sleep(1.0)
    gc.collect()
    process, told = psutil.Process(), (await here.client.get("/metrics")).text
    children = process.children(recursive=True)
    folders = list(Path(tempfile.gettempdir()).glob("disco-engine-*"))
    used = next(line for line in told.splitlines() if line.startswith("disco_kv_blocks_used "))
    return Held(
        files=process.num_fds(),
        processes=len(children),
        zombies=sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
        shared_memory=len(list(Path("/dev/shm").iterdir())),
        folders=len(folders),
        sockets=sum(1 for folder in folders for _ in folder.iterdir()),
        threads=process.num_threads(),
        kv_blocks_used=float(used.split()[1]),
        memory_mib=process.memory_info().rss / 2**20,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--scripted", action="store_true", help="an engine that counts, and starts at once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A directory of its own: what other servers leave is not counted.
    with tempfile.TemporaryDirectory(prefix="disco-kills-") as folder:
        tempfile.tempdir = folder
        report = asyncio.run(kill_again_and_again(options.kills, options.streams, options.scripted))
        tempfile.tempdir = None
    failures = report.failures()
    times = sorted(report.recovery_seconds)
    print(f"{options.kills} kills, {report.in_flight} streams in flight: {report.told_so} were told that the "
          f"engine is gone, {report.finished} were done, {len(report.lost)} lost")  # fmt: skip
    print(f"answers again after {statistics.median(times):.2f} s (median), {times[-1]:.2f} s (most)")
    assert report.before is not None and report.after is not None
    for name, before in asdict(report.before).items():
        print(f"{name:16} {before:10.6g} before {getattr(report.after, name):10.6g} after")
    if options.json:
        save(options.json, asdict(report) | {"failures": failures})
    for failure in failures:
        print("FAILED:", failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
