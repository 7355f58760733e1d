"""What quantizing the draft gives and costs: a draft step's time, and how much is accepted.

    python benchmarks/draft_quantization.py --target REF --draft REF [--json out.json]

Weight-only; the target is as it is, and so is its text. Acceptance is of a fixed SL, greedy, over the
same prompts for all; a step's time is all in, by the host's clock.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from statistics import median
from typing import Any, get_args

import record
import torch
from draft_step import ENDLESS, draft_step
from play import TASKS, generate, read_texts
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig, Quantization
from engine.core import Engine
from engine.models.load import load_tokenizer
from engine.types import SpeculationParams

console = Console()


def main() -> None:
    args = _arguments()
    tokenizer = load_tokenizer(args.target)
    _, texts = read_texts(args.tasks, tokenizer, 0, args.per_task, None)
    speculation = SpeculationParams(policy="static", options={"sl": args.sl})
    rows: list[dict[str, Any]] = []
    for kind in get_args(Quantization):
        config = EngineConfig(
            target=args.target, draft=args.draft, draft_quantization=kind, max_num_seqs=8, max_model_len=2048
        )
        engine = Engine(config)
        drafted = accepted = 0
        for text in texts:
            for found in generate(engine, [text], args.tokens, speculation, 0.0)[1].values():
                drafted += sum(d for d, _ in found)
                accepted += sum(emitted - 1 for _, emitted in found)
        times = [draft_step(engine, "confidence", ENDLESS, rounds=args.rounds)["seconds"] for _ in range(3)]
        rows.append({"kind": kind, "step_seconds": times, "acceptance": accepted / drafted})
        record.save(args.json, {"pair": [args.target, args.draft], "sl": args.sl, "rows": rows})
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    table = Table("draft", "step, ms", f"acceptance at SL={args.sl}")
    for row in rows:
        table.add_row(row["kind"], f"{1e3 * median(row['step_seconds']):.3f}", f"{row['acceptance']:.3f}")
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sl", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, default=Path("out/draft_quantization.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
