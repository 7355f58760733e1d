"""Token trees beside chains on one pair: tokens a pass of the target, and time per token, by budget.

    python benchmarks/trees.py --target smollm2 --draft default [--shape 7b] [--temperatures 0 0.6 1]
        [--budgets 8 16 32 64] [--per-task 3] [--tokens 64] [--repeats 2] [--unseeded] [--head FILE]...
        [--json out/trees.json]

Batch 1, settings interleaved prompt by prompt. A chain of as many tokens as a tree has nodes is verified at
the same cost: chains of SL = budget stand beside the trees, up to the longest that is drafted at once.
Samples are coupled (a seed for each prompt), or with --unseeded drawn by rejection. Time is from a text's
first token to its last. Rules that learn begin on a validation prompt of each task, and keep what they have
learned. With --shape the target is widened in memory (`widen.py`): its text at the shape's cost. Saved after
each temperature.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Seq
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import offload_pair
import record
from play import TASKS, Text, generate, read_texts
from policies import Played, against, ms_per_token, static
from rich.console import Console
from rich.table import Table
from widen import SHAPES

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_tokenizer
from engine.types import SpeculationParams

CHAINS = (2, 3, 5, 8, 12, 16, 24)
ALONE, GOODPUT, GOODPUT_TREE = "target only", "goodput", "goodput_tree"
console = Console(width=170)


def tree(drafter: str, budget: int, deepest: int = 12) -> SpeculationParams:
    return SpeculationParams(drafter=drafter, options={"budget": budget, "max_depth": min(budget, deepest)})


def settings_of(engine: Engine, budgets: Seq[int]) -> dict[str, SpeculationParams]:
    """By name: target alone, chains, each tree at each budget; what the engine does not serve is left out."""
    found = {ALONE: SpeculationParams(drafter="none")}
    found |= {f"chain SL={n}": static(n) for n in CHAINS}
    found[GOODPUT] = SpeculationParams(policy="goodput")
    for kind in ("dyspec", "opt_tree", "c2t"):
        if kind in engine.info.drafters:
            found |= {f"{kind} {budget}": tree(kind, budget) for budget in budgets}
        else:
            console.print(f"{kind} is left out: this engine does not serve it")
    greedy = {"growth": "greedy", "budget": min(budgets), "max_depth": min(budgets)}
    found[f"dyspec greedy {min(budgets)}"] = SpeculationParams(drafter="dyspec", options=greedy)
    found[GOODPUT_TREE] = tree("goodput_tree", max(budgets), max(CHAINS))
    return found


def play(
    engine: Engine, texts: Seq[Text], settings: dict[str, SpeculationParams], temperature: float,
    args: argparse.Namespace,
) -> dict[str, Played]:  # fmt: skip
    """Every setting on every text alone, in turn."""
    found = {name: Played() for name in settings}
    for repeat in range(args.repeats):
        for text in texts:
            for name, speculation in settings.items():
                ids, iterations, seconds = generate(
                    engine, [text], args.tokens, speculation, temperature, not args.unseeded
                )
                found[name].seconds[text.name].append(seconds)
                found[name].tokens[text.name] = ids["0"]
                if repeat == args.repeats - 1:
                    found[name].iterations[text.name] = iterations["0"]
    return found


def rows(found: dict[str, Played], texts: Seq[Text], tokens: int) -> list[dict[str, Any]]:
    """A line for each setting."""
    alone = median(ms_per_token(found[ALONE], texts, tokens))
    made = []
    for name, played in found.items():
        each = [one for text in texts for one in played.iterations[text.name][:-1]]  # the last one is cut
        ms = ms_per_token(played, texts, tokens)
        by_task = {
            task: median(ms_per_token(played, [t for t in texts if t.task == task], tokens))
            for task in dict.fromkeys(text.task for text in texts)
        }
        made.append(
            {
                "setting": name,
                "emitted_per_pass": float(np.mean([emitted for _, emitted in each])),
                "nodes_per_pass": float(np.mean([drafted for drafted, _ in each])),
                "ms_per_token": ms,
                "tokens_per_second": 1e3 / median(ms),
                "speedup": alone / median(ms),
                "ms_by_task": by_task,
                "unlike_target_only": sum(
                    played.tokens[t.name] != found[ALONE].tokens[t.name] for t in texts
                ),
            }
        )
    return made


def compared(found: dict[str, Played], texts: Seq[Text], tokens: int) -> list[dict[str, Any]]:
    """The goodput tree against the best chain of each task in hindsight, and against goodput's chains."""
    chains = [name for name in found if name.startswith("chain")]
    made = []
    for task in [*dict.fromkeys(text.task for text in texts), "all"]:
        mine = [text for text in texts if task in (text.task, "all")]
        best = min(chains, key=lambda name: median(ms_per_token(found[name], mine, tokens)))
        made += [
            {"task": task, "against": name, "speed": against(found[GOODPUT_TREE], found[name], mine)}
            for name in (best, GOODPUT)
        ]
    return made


def show(temperature: float, lines: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    tasks = list(lines[0]["ms_by_task"])
    title = f"temperature {temperature}: ms per token by task"
    table = Table("setting", "emitted/pass", "nodes", "tok/s", "speed-up", *tasks, "unlike", title=title)
    for line in lines:
        table.add_row(
            line["setting"], f"{line['emitted_per_pass']:.2f}", f"{line['nodes_per_pass']:.1f}",
            f"{line['tokens_per_second']:.0f}", f"{line['speedup']:.2f}",
            *(f"{line['ms_by_task'][task]:.2f}" for task in tasks), str(line["unlike_target_only"]),
        )  # fmt: skip
    console.print(table)
    for pair in pairs:
        low, mid, high = pair["speed"]
        name = f"goodput_tree on {pair['task']}"
        console.print(f"{name}: {mid:.3f} [{low:.3f}, {high:.3f}] x {pair['against']}")


def main() -> None:
    args = _arguments()
    config = EngineConfig(
        target=args.target, draft=args.draft, policy="static", heads=tuple(args.head),
        max_model_len=args.context, max_num_seqs=8, max_sl=max(CHAINS), threads=args.threads,
        kv_blocks=None if args.shape is None else 4 * (args.context // 16 + 5),
    )  # fmt: skip
    tokenizer, built = load_tokenizer(args.target), None
    if args.shape is None:
        engine = Engine(config)
    else:
        engine, built = offload_pair.engine_of(config, SHAPES[args.shape], tokenizer, console.print)
    validation, test = read_texts(args.tasks, tokenizer, 1, args.per_task, args.only)
    settings = settings_of(engine, args.budgets)
    figures: dict[str, Any] = {
        "pair": {"target": args.target, "draft": args.draft}, "widened": built,
        "sampling": "rejection" if args.unseeded else "coupled",
        "tokens": args.tokens, "per_task": args.per_task, "repeats": args.repeats, "temperatures": {},
    }  # fmt: skip
    for temperature in args.temperatures:
        for name, speculation in settings.items():  # compiles, captures, learns the costs
            for text in validation if name in (GOODPUT, GOODPUT_TREE) else validation[:1]:
                generate(engine, [text], args.tokens, speculation, temperature, not args.unseeded)
        found = play(engine, test, settings, temperature, args)
        lines, pairs = rows(found, test, args.tokens), compared(found, test, args.tokens)
        figures["temperatures"][str(temperature)] = {"rows": lines, "goodput_tree_against": pairs}
        figures["costs"] = {
            "draft": {str(n): engine.costs.drafts["model"].cost(n, n) for n in (1, 2, 4, 8, 16, 32, 64)},
            "layer": {str(n): engine.costs.drafts["dyspec"].cost(n, n) for n in (1, 2, 4, 8, 16, 32, 64)},
            "verify": {str(n): engine.costs.verify.cost(1, n) for n in (1, 2, 4, 9, 16, 17, 33, 65)},
        }
        record.save(args.json, figures)
        show(temperature, lines, pairs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="to which the target is widened")
    parser.add_argument("--head", action="append", default=[], help="a trained head; the shipped are found")
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--only", nargs="+", help="tasks; default: all in the file")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--per-task", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--unseeded", action="store_true", help="samples by rejection")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/trees.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
