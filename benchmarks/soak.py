"""Does it keep working: clients of every kind for half an hour, and what must hold meanwhile.

    python benchmarks/soak.py [--clients 32] [--minutes 30] [--json out/soak.json] [-- FLAGS OF THE SERVER]
    python benchmarks/soak.py --url http://127.0.0.1:8000 --pid PID

Starts the default pair in fp32 on the CPU, or asks a server that nobody else asks meanwhile. Clients send
all that is served: every drafter and policy of /v1/policies, grammars, n, best_of, stop strings, streams,
over all three routes; some leave in the middle. It holds:
answers to seeded requests are those of the same requests alone; memory, files and processes do not grow;
/metrics counts what the clients count; nothing hangs, nothing is a 5xx.
Prints a table, saves JSON, exits with 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import record
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "clients"))

from live import ROOT, RunFailed, Served, serving
from soaking.load import Load, Outcome
from soaking.processes import Watch, slope
from soaking.questions import Question, Questions, Sizes, pairs_of
from soaking.verdict import Held, agreeing, answers, as_record, books, flat, nothing_kept
from suites.accounts import whole
from suites.compared import Line, idle, scrape, since, total

FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "2048", "--kv-blocks", "700")
_BLOCK = 16  # tokens of a KV block
_OVER = 1.5  # times its size that the KV pool is filled
console = Console(width=140)


@dataclass(frozen=True)
class Plan:
    """`minutes` and `warm_up`; `deadline` and `every` in seconds; `limit`: MiB an hour."""

    clients: int = 32
    minutes: float = 30
    warm_up: float = 12
    catalogue: int = 120
    seed: int = 0
    deadline: float = 300
    limit: float = 30
    every: float = 2
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def window(self) -> float:
        """Seconds of which the least memory counts: ten points at least."""
        return min(60.0, 6 * self.minutes)


@dataclass
class Report:
    """All that was found."""

    held: list[Held]
    figures: dict[str, Any]

    @property
    def good(self) -> bool:
        return all(held.holds for held in self.held)


class Soak:
    """One soak of one server; `watch`: of its processes, None if they are elsewhere."""

    def __init__(self, served: Served, plan: Plan, watch: Watch | None) -> None:
        self._served, self._plan, self._watch = served, plan, watch
        self._load = Load(plan.deadline)
        self._held: list[Held] = []
        self._outcomes: dict[str, Outcome] = {}
        self._lines: dict[str, list[Line]] = {}

    async def run(self) -> Report:
        """The catalogue alone, what is answered whole at once, a warm-up, the soak, some alone once more.

        Before the warm-up all grammars are compiled, and the KV pool is filled: both keep memory once used.
        """
        plan, watch, load = self._plan, self._watch, self._load
        async with self._client() as client:
            pairs = pairs_of((await client.get("/v1/policies")).raise_for_status().json())
        questions = Questions(self._served.model, pairs, plan.sizes, plan.catalogue, plan.seed)
        looking = asyncio.create_task(watch.look(plan.every)) if watch else None
        await self._stretch("alone", lambda client: load.learn(client, questions.catalogue))
        quiet = whole([question.ask for question in questions.catalogue])
        again = _each([questions.again(each) for each in questions.catalogue if each.ask in quiet])
        await self._stretch("all at once", lambda client: load.run(client, again, plan.clients), exact=True)
        grammars = _each(questions.grammars())
        await self._stretch("compiling", lambda client: load.run(client, grammars, plan.clients))
        await self._fill(questions)
        mixed = _for(questions.mixed, plan.warm_up)
        await self._stretch("warm-up", lambda client: load.run(client, mixed, plan.clients))
        before, began = watch.stand() if watch else None, time.monotonic()
        soaking = _for(questions.mixed, plan.minutes, least=2 * len(pairs))
        await self._stretch("soak", lambda client: load.run(client, soaking, plan.clients))
        after, ended = watch.stand() if watch else None, time.monotonic()
        once_more = _each([questions.again(question) for question in questions.catalogue[:20]])
        await self._stretch("alone again", lambda client: load.run(client, once_more, 1))
        if looking is not None:
            looking.cancel()
        figures = self._figures(ended - began) | {"pairs": ["/".join(pair) for pair in pairs]}
        self._held[:0] = answers(list(self._outcomes.values()), pairs)
        if watch and before and after:
            figures |= self._memory(watch, began, ended)
            self._held += nothing_kept(before, after, slack=2)
        return Report(self._held, figures)

    async def _fill(self, questions: Questions) -> None:
        """Writes every block of the KV pool once, since on a CPU it takes memory only as it is written."""
        async with self._client() as client:
            tokens = int(_OVER * _BLOCK * total(await scrape(client), "disco_kv_blocks"))
        prompts = _each(questions.filling(tokens))
        await self._stretch("filling the KV pool", lambda client: self._load.run(client, prompts, 4))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {self._served.key}"}
        limits = httpx.Limits(max_connections=None)
        late = 2 * self._plan.deadline  # its own deadline is to end a request
        async with httpx.AsyncClient(
            base_url=self._served.url, headers=headers, timeout=late, limits=limits
        ) as client:
            yield client

    async def _stretch(
        self, name: str, ask: Callable[[httpx.AsyncClient], Awaitable[Outcome]], *, exact: bool = False
    ) -> None:
        """Asks, waits until nothing runs, and compares the counts. Its connections are closed then."""
        began = time.monotonic()
        async with self._client() as client:
            before = await idle(client)
            outcome = self._outcomes[name] = await ask(client)
            seconds = time.monotonic() - began
            try:
                counted = since(before, await idle(client, self._plan.deadline))
            except TimeoutError:
                self._held.append(
                    Held(f"idle after {name}", "still busy", f"{self._plan.deadline:g} s", False)
                )
                return
        self._lines[name] = books(outcome, counted, exact)
        self._held.append(agreeing(name, self._lines[name]))
        told, compared = outcome.told, outcome.compared.total()
        console.print(
            f"{name}: {outcome.kinds.total()} requests in {seconds:.0f} s, {told.tokens} tokens in answers, "
            f"{told.left} left, {compared} compared, {len(outcome.differing)} differ"
        )

    def _memory(self, watch: Watch, began: float, ended: float) -> dict[str, Any]:
        """Slopes of the soak itself, and what they are of."""
        found, plan = {}, self._plan
        for role in sorted(watch.resident):
            floors = watch.floors(role, began, ended, plan.window)
            fit = slope(floors)
            self._held.append(flat(role, fit, plan.limit))
            found[role] = {"slope": asdict(fit), "floors": floors}
        return {"resident_mib": found}

    def _figures(self, seconds: float) -> dict[str, Any]:
        told_of = {name: _told(outcome) for name, outcome in self._outcomes.items()}
        lines = {name: [asdict(line) for line in found] for name, found in self._lines.items()}
        return {"seconds": seconds, "stretches": told_of, "counts": lines}


def _told(outcome: Outcome) -> dict[str, Any]:
    """A stretch for the record; of what went wrong, the first twenty."""
    return {
        "requests": outcome.kinds.total(),
        "kinds": dict(outcome.kinds),
        "pairs": {"/".join(pair): count for pair, count in outcome.pairs.items()},
        "answers": {" ".join(answer): count for answer, count in outcome.answers.items()},
        "tokens": outcome.told.tokens,
        "left": outcome.told.left,
        "compared": outcome.compared.total(),
        "median_seconds": median(outcome.seconds or [0]),
        "longest_seconds": max(outcome.seconds, default=0),
        "differing": [
            {**as_record(each.question), "alone": [asdict(said) for said in each.alone],
             "now": [asdict(said) for said in each.now]}
            for each in outcome.differing[:20]
        ],
        "faults": outcome.faults[:20],
        "late": [as_record(question) for question in outcome.late[:20]],
    }  # fmt: skip


def _each(questions: list[Question]) -> Callable[[], Question | None]:
    """One after the other."""
    left = iter(questions)
    return lambda: next(left, None)


def _for(make: Callable[[], Question], minutes: float, least: int = 0) -> Callable[[], Question | None]:
    """New ones, for so long, and so many at least: on a slow machine everything is to take part, too."""
    end, made = time.monotonic() + 60 * minutes, count()
    return lambda: make() if next(made) < least or time.monotonic() < end else None


def show(report: Report) -> None:
    """The table, and the first of what went wrong."""
    table = Table("what must hold", "found", "limit", "")
    for held in report.held:
        table.add_row(held.what, held.found, held.limit, "" if held.holds else "[bold red]DOES NOT HOLD")
    console.print(table)
    for name, stretch in report.figures["stretches"].items():
        for what in ("faults", "late", "differing"):
            for one in stretch[what][:3]:
                console.print(f"{name}, {what}: {one}", markup=False, soft_wrap=True)


def _listening(url: str) -> int:
    """The child of ours that listens there."""
    port = urlsplit(url).port
    for child in psutil.Process().children():
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in child.net_connections()):
            return int(child.pid)
    raise RunFailed(f"no process of ours listens at {url}")


def main() -> int:
    args = _arguments()
    plan = Plan(
        args.clients, args.minutes, args.warm_up, args.catalogue, args.seed, args.deadline, args.limit
    )  # fmt: skip
    flags = [] if args.url else [*FLAGS, *args.flags]
    there = nullcontext(Served(args.url, args.api_key, args.model)) if args.url else None
    try:
        with there or serving(ROOT / "out" / "soak.log", *flags) as served:
            pid = args.pid if args.url else _listening(served.url)
            watch = Watch(pid) if pid else None
            report = asyncio.run(Soak(served, plan, watch).run())
    except (RunFailed, psutil.Error, httpx.HTTPError) as fault:
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
        return 1
    show(report)
    if watch is None:
        console.print("memory, files and processes were not looked at: no --pid")
    held = [asdict(held) for held in report.held]
    found = {"holds": report.good, "plan": asdict(plan), "flags": flags, "held": held, **report.figures}
    record.save(args.json, found)
    console.print("everything holds" if report.good else "NOT everything holds")
    return 0 if report.good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--clients", type=int, default=plan.clients)
    parser.add_argument("--minutes", type=float, default=plan.minutes)
    parser.add_argument("--warm-up", type=float, default=plan.warm_up, help="minutes before, not measured")
    parser.add_argument(
        "--catalogue", type=int, default=plan.catalogue, help="requests whose answers are known"
    )
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--deadline", type=float, default=plan.deadline, help="seconds of a request")
    parser.add_argument("--limit", type=float, default=plan.limit, help="of memory's slope, MiB an hour")
    parser.add_argument("--url", help="of a server that runs, without a path; fp32, on a CPU")
    parser.add_argument("--pid", type=int, help="of that server, if it runs here")
    parser.add_argument("--model", default="smollm2", help="of that server")
    parser.add_argument("--api-key", default="none", help="of that server")
    parser.add_argument("--json", type=Path, default=Path("out/soak.json"))
    parser.add_argument("flags", nargs="*", help="of `disco-serve serve`, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
