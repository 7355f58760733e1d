"""Every fault of the engine and of clients, for streams and for whole answers: who is harmed, how long?

    python tests/fault/table.py [--only NAME,NAME] [--clients 8] [--device cuda] [--json FILE]

Injects each fault while requests are in flight. A request is lost if it should not have been: it got another
text than without the fault, an answer without an end, an undefined error; or an error though the fault was
none of its business. Prints a table, saves JSON, exits with 1 if anything was lost or did not recover.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import hostile_clients as hostile
from record import save
from starts import STARTS, Started, started

if TYPE_CHECKING:  # it imports all of a server, which the engine's process would import with this file
    from ground import Ground, Told

MARKED = "# is harmed"  # begins with the mark by which a fault of one row finds it


@dataclass(frozen=True)
class Fault:
    """`inject` None: by its name, in the engine's next step. `client`: it is one client's doing. `kills`: the
    engine is started anew, and all in flight are told so. `victim`: the code that the marked request is told;
    None: nobody is told anything. `faults`: of speculation, as the metric counts them. `gpu`: it takes one.
    """

    name: str
    what: str
    inject: Callable[[Ground], None] | None = None
    client: hostile.Client | None = None
    kills: bool = False
    victim: str | None = None
    faults: int = 0
    gpu: bool = False


def _signal(number: signal.Signals) -> Callable[[Ground], None]:
    def send(here: Ground) -> None:
        assert here.engine.pid is not None
        os.kill(here.engine.pid, number)

    return send


def _clock(here: Ground) -> None:
    """Both processes' clocks jump back by a day."""
    here.inject("clock")
    right = time.time
    time.time = lambda: right() - 86400.0


FAULTS = (
    Fault("killed", "SIGKILL of the engine's process", _signal(signal.SIGKILL), kills=True),
    Fault("stopped", "SIGSTOP of the engine's process", _signal(signal.SIGSTOP), kills=True),
    Fault("hang", "a step that never ends", kills=True),
    Fault("spin", "a step that never ends and keeps the CPU busy", kills=True),
    Fault("exit", "the process exits", kills=True),
    Fault("abort", "the process aborts (SIGABRT)", kills=True),
    Fault("segfault", "a segmentation fault", kills=True),
    Fault("raise", "an exception in a step", kills=True),
    Fault("cuda", "a CUDA error in a step", kills=True),
    Fault("assert", "an assertion fails in a kernel on the device", kills=True, gpu=True),
    Fault("garbage", "a message that cannot be read", kills=True),
    Fault("close", "the engine's ZeroMQ socket is closed", kills=True),
    Fault("cut", "the connection under ZeroMQ is cut, the engine hangs", kills=True),
    Fault("memory", "out of memory for more than one row"),
    Fault("hog", "all of the GPU's memory is somebody else's", gpu=True),
    Fault("memory_row", "out of memory for one row, even alone", victim="request_failed"),
    Fault("nan", "NaN in the logits of one row", victim="request_failed"),
    Fault("draft", "the draft model raises", faults=1),
    Fault("draft_nan", "the draft model gives NaN", faults=1),
    Fault("policy", "the stop policy raises", faults=1),
    Fault("disk", "no file can be written: full disk, policy state"),
    Fault("log", "the log is on a full disk"),
    Fault("clock", "the wall clock jumps back by a day", _clock),
    Fault("deaf", "a client that never reads a long answer", client=hostile.never_reads),
    Fault("slow", "a client whose body comes byte by byte", client=hostile.writes_slowly),
    Fault("half_closed", "a client that ends its side and listens", client=hostile.ends_its_side),
    Fault("reset", "a client that resets 20 connections within answers", client=hostile.resets),
    Fault("connects", "1000 connections that say nothing, or half a request", client=hostile.connects),
    Fault("no_utf8", "a body that is no UTF-8", client=hostile.no_utf8),
    Fault("no_http", "bytes that are no HTTP", client=hostile.no_http),
)


@dataclass
class Row:
    """One line of the table. `told`: in flight, and told of the fault; `fine`: answered as without it."""

    fault: str
    what: str
    stream: bool
    injected: int
    in_flight: int
    fine: int
    told: int
    restarts: int
    recovery_seconds: float
    lost: list[str] = field(default_factory=list)


async def inject(here: Ground, fault: Fault, stream: bool, asked: Sequence[str]) -> Row:
    """One fault under requests, and what came of it. The engine is whole afterwards."""
    restarts, faults, clock = here.engine.restarts, await here.counted(), time.time
    requests = [asyncio.create_task(here.ask(prompt, stream)) for prompt in asked]
    await asyncio.sleep(0.3)
    begin = time.monotonic()
    harm = asyncio.create_task(fault.client(here, stream)) if fault.client else None
    if harm is None:
        (fault.inject or (lambda here: here.inject(fault.name)))(here)
    if fault.kills:
        await here.until(lambda: here.engine.state != "ready")
    await here.recovered()
    recovery = time.monotonic() - begin
    told: list[Told] = await asyncio.gather(*requests)
    treated = await harm if harm else None
    await here.idle()
    late: list[Told] = await asyncio.gather(*(here.ask(prompt, stream) for prompt in asked[1:]))
    time.time = clock
    restarts = here.engine.restarts - restarts
    lost = [f"{each.prompt!r}: {each.lost}" for each in (*told, *late) if each.lost is not None]
    for each in told:
        expected = (
            {None, "engine_unavailable"} if fault.kills else {fault.victim if each.prompt == MARKED else None}
        )
        if each.code not in expected:
            lost.append(f"{each.prompt!r} was told {each.code}")
    lost += [f"{each.prompt!r}, asked later, was told {each.code}" for each in late if each.code is not None]
    lost += [f"the client: {treated}"] if treated else []
    if restarts != fault.kills:
        lost.append(f"{restarts} restarts")
    met = await here.counted() - faults
    if met != fault.faults and not fault.kills:
        lost.append(f"{met:g} faults of speculation are counted")
    if not fault.kills:
        here.inject("heal")
        await here.recovered()
    ended = sum(each.code is not None for each in told)
    return Row(
        fault.name, fault.what, stream, 1, len(told), len(told) - ended, ended, restarts, recovery, lost
    )


async def run(
    faults: Sequence[Fault], clients: int, ways: Sequence[bool] = (True, False), device: str = "cpu"
) -> AsyncGenerator[Row, None]:
    """A row for every fault, and for streams and whole answers."""
    from ground import ground

    asked = [MARKED, *(f"client number {i} says" for i in range(1, clients))]
    async with ground(asked, device=device) as here:
        for fault in faults:
            for stream in ways:
                yield await inject(here, fault, stream, asked)


def _say(row: Row) -> None:
    way = "stream" if row.stream else "whole"
    counts = (
        f"{row.injected:3} {row.in_flight:4} {row.fine:5} {row.told:5} {len(row.lost):5} {row.restarts:4}"
    )
    print(f"{row.fault:12} {way:7} {counts} {row.recovery_seconds:8.2f}  {row.what}", flush=True)
    for lost in row.lost:
        print("  LOST:", lost, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="names of faults, set apart by commas")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = None if options.only is None else set(options.only.split(","))
    known = {fault.name for fault in FAULTS} | {start.name for start in STARTS}
    if wanted is not None and wanted - known:
        parser.error(f"unknown: {', '.join(sorted(wanted - known))}; known: {', '.join(sorted(known))}")
    faults = [fault for fault in FAULTS if wanted is None or fault.name in wanted]
    faults = [fault for fault in faults if options.device == "cuda" or not fault.gpu]
    rows: list[Row] = []
    starts: list[Started] = []

    def keep() -> None:  # as it grows: what was seen before a hang is not lost
        if options.json:
            found = {
                "in_flight": [asdict(row) for row in rows],
                "at_start": [asdict(each) for each in starts],
            }
            save(options.json, {"device": options.device, **found})

    async def inject_all() -> None:
        async with aclosing(run(faults, options.clients, device=options.device)) as found:
            async for row in found:
                rows.append(row)
                _say(row)
                keep()

    print("fault        as      inj fly  fine  told  lost  new  seconds  what")
    if faults:
        asyncio.run(inject_all())
    for start in STARTS:
        if wanted is None or start.name in wanted:
            starts.append(started(start, options.device))
            keep()
    lost = sum(len(row.lost) for row in rows) + sum(len(each.wrong) for each in starts)
    print(f"{len(rows)} injections in flight, {len(starts)} at start: {lost} lost")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
