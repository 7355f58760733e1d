"""Whether answers and /metrics agree, to the token, over requests of every kind.

    python tests/suites/check_numbers.py --requests 200 [--port N | --url URL]

Starts the default pair, or asks a server that nobody else asks meanwhile. First requests that are answered
whole: there the figures of speculation agree, too. Then all kinds at once, with stop strings, best_of and
clients that leave in the middle: the tokens of all answers and the discarded ones are those generated.
Prints a table; exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import nullcontext
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
from live import ROOT, RunFailed, Served, serving
from suites.accounts import Ask, ask_all, mix, whole
from suites.compared import Line, idle, lines, since

AT_ONCE = 32


async def check(served: Served, requests: int, tokens: int, long: int) -> bool:
    """Both rounds; whether everything agreed."""
    headers = {"authorization": f"Bearer {served.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=900, limits=limits) as client:
        every = mix(requests, served.model, tokens, long)
        quiet = whole(every)[: requests // 4]
        rest = [ask for ask in every if ask not in quiet]
        agreed = [
            await _round(client, f"{len(quiet)} requests answered whole", quiet, exact=True),
            await _round(client, f"{len(rest)} requests of all kinds", rest, exact=False),
        ]
    return all(agreed)


async def _round(client: httpx.AsyncClient, name: str, asks: list[Ask], *, exact: bool) -> bool:
    before = await idle(client)
    told = await ask_all(client, asks, AT_ONCE)
    counted = since(before, await idle(client, 600))
    print(f"{name}: {told.answers} answers, {told.left} left, {told.tokens} tokens in answers")
    for reason in ("stop_string", "best_of", "aborted", "error"):
        print(f"  discarded, {reason}: {counted['disco_discarded_tokens_total', reason]:.0f}")
    found = lines(asks, told, counted, exact)
    print(_table(found))
    for fault in told.faults:
        print(f"FAULT {fault}")
    return not told.faults and all(line.agrees for line in found)


def _table(found: list[Line]) -> str:
    rows = [("", "answers", "/metrics", "")]
    rows += [(x.what, f"{x.answers:.0f}", f"{x.metrics:.0f}", "" if x.agrees else "DIFFERS") for x in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    form = "  {:{}}  {:>{}}  {:>{}}  {}"
    places = [(a, widths[0], b, widths[1], c, widths[2], d) for a, b, c, d in rows]
    return "\n".join(form.format(*place).rstrip() for place in places)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--url", help="of a server that runs, without a path; it serves smollm2")
    parser.add_argument("--tokens", type=int, default=12, help="of an answer, about")
    parser.add_argument("--long", type=int, default=1000, help="tokens of an answer that will be left")
    arguments = parser.parse_args()
    try:
        log = ROOT / "out" / "suites" / "numbers.log"
        there = nullcontext(Served(arguments.url, "none", "smollm2")) if arguments.url else None
        with there or serving(log, "--port", str(arguments.port)) as served:
            agreed = asyncio.run(check(served, arguments.requests, arguments.tokens, arguments.long))
    except RunFailed as fault:
        print(fault, file=sys.stderr)
        return 1
    print("everything agrees" if agreed else "NOT everything agrees")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
