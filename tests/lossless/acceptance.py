"""The identity tests of test_identity.py in full, over many processes: `make lossless` runs it.

    python tests/lossless/acceptance.py [--jobs N] [--prompts 56] [--tokens 64] [--json out/lossless.json]

Every drafter and policy, each alone at batch 1 and 8 and all mixed in batches of 8: greedy against
transformers' generate, seeded sampling against the engine without a draft. Prints a table, saves
it as JSON lines while it runs, and fails if a position differs anywhere.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import test_identity as identity
import torch
from prompts import PROMPTS

from engine.core import Engine
from engine.models.load import resolve

_engine: Engine | None = None


def main() -> None:
    args = _arguments()
    kinds = {"greedy": identity.GREEDY, **identity.SEEDED}
    kinds = {name: kind for name, kind in kinds.items() if args.kind is None or name in args.kind}
    where = Path(resolve("smollm2"))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, _start, (args.threads,)) as pool, args.json.open("w") as sink:
        texts = PROMPTS[: args.prompts]
        expected = {
            name: pool.starmap(_expected, [(where, text, args.tokens, name) for text in texts], 1)
            for name in kinds
        }
        tasks = [
            (where, name, expected[name], args.tokens, label, speculations, batch)
            for name in kinds
            for label, speculations, batch in identity.configurations(list(identity.EVERY))
            if args.batch in (None, batch) and re.search(args.only, label)
        ]
        tasks.sort(key=lambda task: task[-1])  # the long ones, batch 1, first
        print(identity.HEADER, flush=True)
        wrong: list[str] = []
        for line, row, parted in pool.imap_unordered(_compare, tasks):
            print(line, flush=True)
            sink.write(json.dumps(row) + "\n")
            sink.flush()
            wrong.extend(parted)
    print(f"{len(tasks)} configurations, {len(wrong)} mismatches")
    if wrong:
        raise SystemExit("\n".join(wrong))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kind", action="append", help="greedy or a seeded kind; may be repeated")
    parser.add_argument("--batch", type=int, help="1 or 8; both by default")
    parser.add_argument("--only", default="", help="a pattern for the configurations' names")
    parser.add_argument("--json", type=Path, default=Path("out/lossless.json"))
    return parser.parse_args()


def _start(threads: int) -> None:
    torch.set_num_threads(threads)


def _build(where: Path) -> Engine:
    global _engine  # one engine a process
    if _engine is None:
        _engine = Engine(identity.config(where))
    return _engine


def _expected(where: Path, text: str, tokens: int, kind: str) -> list[int]:
    """What the target alone gives: transformers' greedy, or the engine without a draft, seeded."""
    if kind == "greedy":
        return identity.by_transformers(where, (text,), tokens)[0]
    ids = identity.encoded(where, (text,))
    return identity.generate(_build(where), ids, tokens, identity.SEEDED[kind], [identity.EVERY["none"]], 1)[
        0
    ][0]


def _compare(task: tuple[Any, ...]) -> tuple[str, dict[str, Any], list[str]]:
    where, kind, expected, tokens, label, speculations, batch = task
    prompts = identity.encoded(where, PROMPTS[: len(expected)])
    params = identity.GREEDY if kind == "greedy" else identity.SEEDED[kind]
    tally = identity.compare(
        _build(where), f"{kind}: {label}", prompts, expected, tokens, params, speculations, batch
    )
    row = {
        "name": tally.name,
        "positions": tally.positions,
        "mismatches": len(tally.parted),
        "drafted": tally.drafted,
        "accepted": tally.accepted,
    }
    return tally.line(), row, identity.explain(where, tally, prompts, expected)


if __name__ == "__main__":
    main()
