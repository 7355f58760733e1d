"""Load on any server with OpenAI's API: tokens per second, time to first token, time per token.

    python benchmarks/http_load.py --url http://127.0.0.1:8000/v1 --model smollm2 --streams 1 4 16 32

Closed loop: S streams, each sending its next request as soon as its last has ended. Streamed
/v1/completions at temperature 0, all answers of --tokens tokens (`ignore_eos`). A round of one request
a stream warms the server up and is not counted. Output tokens are those of the usage chunk; seconds
are those from the first request sent to the last one ended. TTFT ends with the first chunk that has
a choice; TPOT is (last chunk - first chunk) / (tokens - 1) of one request. A request that fails, breaks
off or is short of tokens ends the run with exit code 1: there are no figures over failed requests.

`generator CPU` is the busiest load process's share of one core: near 100% it is the load generator that
was measured, and --processes must grow. `--self-test` shows its ceiling, against a server that only sends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from load_prompts import SHORT, Wire, on_the_wire
from peers.streams import Answer, Load, LoadError, send
from rich.console import Console
from rich.table import Table

BUSY = 0.8
"""Share of a core above which a load process may have held up its streams."""


@dataclass(frozen=True)
class LoadFigures:
    """What a load gave; times in milliseconds, `generator_cpu` the busiest load process's share of a core."""

    streams: int
    requests: int
    output_tokens: int
    chunks: int
    seconds: float
    tokens_per_second: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    processes: int
    generator_cpu: float


def measure(
    url: str,
    model: str,
    streams: int,
    tokens: int,
    requests: int,
    prompts: Sequence[Wire] = SHORT,
    *,
    processes: int = 1,
    **options: Any,
) -> LoadFigures:
    """Warms up with one request a stream, then measures `requests` in all; `options` are those of `Load`.

    Load processes are spawned: a script that calls this with more than one needs its `__main__` guard.
    Raises LoadError if any request fails, ValueError for numbers that cannot work.
    """
    load = Load(url, model, streams, tokens, requests, tuple(prompts), **options)
    answers, cpu = send(load, processes)
    return figures(answers, streams=streams, processes=processes, generator_cpu=cpu)


def figures(
    answers: Sequence[Answer], *, streams: int, processes: int = 1, generator_cpu: float = 0.0
) -> LoadFigures:
    """The figures of all answers of a load."""
    seconds = max(each.ended for each in answers) - min(each.sent for each in answers)
    tokens = sum(each.tokens for each in answers)
    ttft = [each.ttft for each in answers]
    tpot = [each.tpot for each in answers if each.tpot is not None]
    return LoadFigures(
        streams=streams,
        requests=len(answers),
        output_tokens=tokens,
        chunks=sum(each.chunks for each in answers),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        ttft_p50_ms=_percentile(ttft, 50),
        ttft_p95_ms=_percentile(ttft, 95),
        tpot_p50_ms=_percentile(tpot, 50) if tpot else None,
        tpot_p95_ms=_percentile(tpot, 95) if tpot else None,
        processes=processes,
        generator_cpu=generator_cpu,
    )


def _percentile(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1e3


def show(rows: Sequence[LoadFigures], title: str) -> None:
    """One line a number of streams."""
    table = Table(
        *("streams", "requests", "tokens/s", "TTFT p50 ms", "p95", "TPOT p50 ms", "p95"),
        *("tokens/chunk", "generator CPU"),
        title=title,
    )
    for row in rows:
        tpot = [f"{each:.2f}" if each is not None else "-" for each in (row.tpot_p50_ms, row.tpot_p95_ms)]
        table.add_row(
            *(str(row.streams), str(row.requests), f"{row.tokens_per_second:.1f}"),
            *(f"{row.ttft_p50_ms:.1f}", f"{row.ttft_p95_ms:.1f}", *tpot),
            *(f"{row.output_tokens / row.chunks:.2f}", f"{row.generator_cpu:.0%} x {row.processes}"),
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    for row in rows:
        if row.generator_cpu > BUSY:
            console.print(f"{row.streams} streams: the load generator itself was busy; raise --processes")


def main() -> None:
    args = _arguments()
    try:
        if args.self_test:
            rows, title = _self_test(args)
        elif args.url is None or args.model is None:
            raise ValueError("--url and --model say where the server is and what it serves")
        else:
            rows, title = measure_all(args, args.url, args.model), f"{args.model} at {args.url}"
    except (LoadError, ValueError) as error:
        raise SystemExit(f"no figures: {error}") from error
    show(rows, f"{title}: {args.tokens} tokens a request")
    keep(args, rows, what=__doc__)


def measure_all(args: argparse.Namespace, url: str, model: str) -> list[LoadFigures]:
    """`measure` at every number of streams that the options of `add_load_options` ask for."""
    prompts = on_the_wire(args.prompts, args.tokenizer)
    options = {name: getattr(args, name) for name in ("speculation", "ignore_eos", "api_key", "timeout")}
    rows = []
    for streams in args.streams:
        requests = 4 * streams if args.requests is None else args.requests
        processes = min(args.processes, streams)
        rows.append(
            measure(url, model, streams, args.tokens, requests, prompts, processes=processes, **options)
        )
        print(f"{streams} streams: {rows[-1].tokens_per_second:.1f} tokens/s", file=sys.stderr, flush=True)
    return rows


def keep(args: argparse.Namespace, rows: Sequence[LoadFigures], **facts: Any) -> None:
    """Saves figures, facts and what was asked as JSON, if --json says where."""
    if args.json is None:
        return
    from record import save  # brings torch, which the load processes can do without

    asked = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("json", "api_key")
    }
    save(args.json, {**facts, "asked": asked, "figures": [asdict(row) for row in rows]})


def _self_test(args: argparse.Namespace) -> tuple[list[LoadFigures], str]:
    from peers.fake_server import serving

    if min(args.streams) < 1:
        raise ValueError(f"streams must be at least 1, not {min(args.streams)}")
    rows = []
    for streams in args.streams:
        with serving(args.rate / streams) as url:
            processes = min(args.processes, streams)
            rows.append(measure(url, "fake", streams, args.tokens, 4 * streams, ("x",), processes=processes))
    return rows, f"a server that only sends, {args.rate:g} chunks/s over all streams"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="base URL, with /v1")
    parser.add_argument("--model", help="the name that requests give")
    add_load_options(parser)
    parser.add_argument("--speculation", type=json.loads, help="JSON for disco-serve's field of that name")
    parser.add_argument("--api-key")
    parser.add_argument("--self-test", action="store_true", help="measure the load generator itself")
    parser.add_argument("--rate", type=float, default=4000.0, help="chunks/s of the self-test's server")
    return parser.parse_args()


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options that every server's load has in common."""
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument(
        "--requests", type=int, help="in all, for each number of streams; default: 4 a stream"
    )
    parser.add_argument("--prompts", choices=["short", "heldout"], default="short")
    parser.add_argument("--tokenizer", help="send token ids by it, messages in its chat template; else texts")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--processes", type=int, default=1, help="load processes")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds without any byte")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(speculation=None, api_key=None)


if __name__ == "__main__":
    main()
