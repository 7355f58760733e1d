"""Stop policies under load: tokens per second of an engine by the number of streams, tasks mixed.

    python benchmarks/policy_load.py --target smollm2 --draft default [--streams 1 4 16 32 64]

Closed loop without HTTP: as many requests as streams are always open, the next one is added when one
ends. Prompts of the tasks take turns. Policies are interleaved, level by level; the throughput is that
while all streams are open, prefill included: the clock stops when the last request is added, so that
the requests that happen to be left over at the end say nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from itertools import count, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import record
from play import TASKS
from rich.console import Console
from rich.table import Table

from classifiers.data_files import encode, read_data
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_tokenizer
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

ALONE = "target only"
SETTINGS = {
    ALONE: SpeculationParams(drafter="none"),
    **{f"static SL={n}": SpeculationParams(policy="static", options={"sl": n}) for n in (1, 2, 4, 8)},
    "heuristic": SpeculationParams(policy="heuristic"),
    "goodput": SpeculationParams(policy="goodput"),
}
_LEAST = 16  # requests of a run, for few streams
_SALT = count()
console = Console(width=140)


def prompts(tasks: Path, only: Seq[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Of the tasks in turn."""
    by_task: dict[str, list[tuple[int, ...]]] = {task: [] for task in only}
    for prompt in read_data([str(tasks)])[0]:
        if prompt.category in by_task:
            by_task[prompt.category].append(encode(prompt, tokenizer))
    return [ids for turn in zip_longest(*by_task.values()) for ids in turn if ids is not None]


def throughput(
    engine: Engine, texts: Seq[tuple[int, ...]], streams: int, requests: int, tokens: int,
    speculation: SpeculationParams,
) -> tuple[float, float]:  # fmt: skip
    """Tokens per second while all `streams` are open, and the mean SL of the iterations."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    left = [texts[i % len(texts)] for i in range(requests)]

    def send() -> None:
        name = str(next(_SALT))
        request = GenerateRequest(
            id=name, prompt_ids=left.pop(), params=params, speculation=speculation, cache_salt=name
        )
        engine.add(request)

    emitted = drafted = iterations = 0
    for _ in range(streams):
        send()
    begin, seconds = time.perf_counter(), 0.0
    while engine.has_work():
        for event in engine.step()[0]:
            if event.error is not None:
                raise SystemExit(event.error)
            emitted += len(event.token_ids) if not seconds else 0
            drafted += event.drafted
            iterations += event.iterations
            if event.finish_reason is not None and left:
                send()
        if not left and not seconds:
            seconds = time.perf_counter() - begin
    return emitted / seconds, drafted / max(iterations, 1)


def main() -> None:
    args = _arguments()
    config = EngineConfig(
        target=args.target, draft=args.draft, policy="goodput", max_model_len=args.context,
        max_num_seqs=max(args.streams), threads=args.threads,
    )  # fmt: skip
    engine = Engine(config)
    texts = prompts(args.tasks, args.only, load_tokenizer(args.target))
    rows: list[dict[str, Any]] = []
    for streams in args.streams:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
        requests = max(args.waves * streams, _LEAST)
        for speculation in SETTINGS.values():  # compiles, captures, learns
            throughput(engine, texts, streams, requests, args.tokens, speculation)
        for _ in range(args.repeats):
            for name, speculation in SETTINGS.items():
                found[name].append(throughput(engine, texts, streams, requests, args.tokens, speculation))
        for name, runs in found.items():
            rows.append(
                {
                    "streams": streams,
                    "policy": name,
                    "tokens_per_second": [speed for speed, _ in runs],
                    "sl_mean": median(sl for _, sl in runs),
                }
            )
        record.save(args.json, {"pair": [args.target, args.draft], "tokens": args.tokens, "rows": rows})
        _show(rows, streams)
    if args.plot is not None:
        plot(rows, args.plot)


def plot(rows: list[dict[str, Any]], to: Path) -> None:
    """Throughput over that of the target alone, by streams."""
    from matplotlib.figure import Figure

    speeds = {(row["policy"], row["streams"]): median(row["tokens_per_second"]) for row in rows}
    streams = sorted({row["streams"] for row in rows})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(row["policy"] for row in rows):
        over = [speeds[policy, count] / speeds[ALONE, count] for count in streams]
        axes.plot(streams, over, marker="o", label=policy, linewidth=3 if policy == "goodput" else 1)
    axes.set(xscale="log", xlabel="streams", ylabel="tokens/s over target only")
    axes.set_xticks(streams, [str(count) for count in streams], minor=False)
    axes.legend()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)


def _show(rows: list[dict[str, Any]], streams: int) -> None:
    mine = [row for row in rows if row["streams"] == streams]
    alone = median(next(row for row in mine if row["policy"] == ALONE)["tokens_per_second"])
    table = Table("policy", "tok/s", "over target only", "spread", "SL", title=f"{streams} streams")
    for row in mine:
        speed, runs = median(row["tokens_per_second"]), row["tokens_per_second"]
        spread = (max(runs) - min(runs)) / speed
        table.add_row(
            row["policy"], f"{speed:.0f}", f"{speed / alone:.2f}", f"{spread:.1%}", f"{row['sl_mean']:.1f}"
        )
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--only", nargs="+", default=["code", "prose"], help="tasks, mixed")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--waves", type=int, default=4, help="requests of each stream")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/policy_load.json"))
    parser.add_argument("--plot", type=Path, help="a PNG of it (needs matplotlib)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
