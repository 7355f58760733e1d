"""Stop policies side by side on one pair: time per token by task, against static SLs, target alone, oracle.

    python benchmarks/policies.py --target smollm2 --draft default [--head FILE]... [--temperature 0|1]
        [--tasks benchmarks/data/tasks.jsonl] [--per-task 8] [--tokens 64] [--repeats 3] [--json out.json]

Batch 1, policies interleaved prompt by prompt, so that a machine that slows down slows them all. The
last prompts of each task are the test; the ones before choose the static SL and the confidence
threshold ("validation"); what a head was taught on is its trainer's business and must be neither.
The oracle drafts exactly what will be accepted, known from a run at SL=24, at the costs that the
engine has measured: nothing can be faster at these costs. Time is from a text's first token to its last.
Policies that learn keep what they have learned from prompt to prompt, so from the second repeat on they
have seen the prompts before. In bfloat16 texts may part at ties; how many did is printed last.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import torch
from draft_step import draft_step
from play import TASKS, Text, generate, read_texts
from rich.console import Console
from rich.table import Table

from classifiers.head_metrics import paired_ratio
from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import load_tokenizer
from engine.types import SpeculationParams

STATIC = (2, 3, 5, 8, 12, 16)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5)
RULES = ("heuristic", "adaedl", "svip", "disco", "specdec_pp", "goodput", "bandit", "ddd")
LONGEST = 24  # of the oracle's run
ALONE, CHOSEN, HINDSIGHT, ORACLE = (
    "target only", "static, chosen on validation", "static, best in hindsight", "oracle",
)  # fmt: skip
console = Console(width=160)


@dataclass
class Played:
    """One policy's runs: seconds by prompt and repeat, iterations (drafted, emitted), and the texts."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    iterations: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[int]] = field(default_factory=dict)


def static(sl: int) -> SpeculationParams:
    return SpeculationParams(policy="static", options={"sl": sl})


def joint(threshold: float, longest: int) -> SpeculationParams:
    options = {"signal": "joint", "threshold": threshold, "max_sl": longest}
    return SpeculationParams(policy="confidence", options=options)


def _named(speculation: SpeculationParams) -> str:
    """NAME:JSON, as `classifier simulate` calls it."""
    return f"{speculation.policy}:{json.dumps(speculation.options)}"


def play(
    engine: Engine, texts: Seq[Text], settings: dict[str, SpeculationParams], args: argparse.Namespace,
    repeats: int, keep: Path | None = None,
) -> dict[str, Played]:  # fmt: skip
    """Every setting on every text alone, in turn. `keep`: a JSON file of what there is after each text."""
    found = {name: Played() for name in settings}
    for repeat in range(repeats):
        for text in texts:
            for name, speculation in settings.items():
                ids, iterations, seconds = generate(
                    engine, [text], args.tokens, speculation, args.temperature
                )
                played = found[name]
                played.seconds[text.name].append(seconds)
                played.tokens[text.name] = ids["0"]
                if repeat == repeats - 1:
                    played.iterations[text.name] = iterations["0"]
            if keep is not None:
                keep.parent.mkdir(parents=True, exist_ok=True)
                keep.write_text(json.dumps({n: [p.seconds, p.iterations] for n, p in found.items()}))
        console.print(f"repeat {repeat + 1} of {repeats}", style="dim")
    return found


def oracle(engine: Engine, played: Played) -> Played:
    """The same texts with exactly the accepted prefix of every draft, at the engine's costs."""
    found = Played()
    for name, iterations in played.iterations.items():
        found.iterations[name] = [(emitted - 1, emitted) for _, emitted in iterations]
        found.seconds[name] = [predicted(engine, found.iterations[name])]
    return found


def predicted(engine: Engine, iterations: Seq[tuple[int, int]]) -> float:
    """Seconds of these iterations at the engine's costs: drafts and one verification each, nothing else."""
    draft, verify = engine.costs.drafts["model"], engine.costs.verify
    return sum(k * (draft.cost(1, 1) or 0.0) + (verify.cost(1, k + 1) or 0.0) for k, _ in iterations)


def ms_per_token(played: Played, texts: Seq[Text], tokens: int) -> list[float]:
    """By repeat, over these texts; the first token of each is not counted."""
    repeats = min(len(played.seconds[text.name]) for text in texts)
    return [
        1e3 * sum(played.seconds[text.name][r] for text in texts) / ((tokens - 1) * len(texts))
        for r in range(repeats)
    ]


def row(name: str, task: str, played: Played, texts: Seq[Text], alone: float, tokens: int) -> dict[str, Any]:
    """A line of the table: the form of `classifier simulate`."""
    iterations = [each for text in texts for each in played.iterations[text.name]]
    drafted = np.array([d for d, _ in iterations])
    accepted = np.array([emitted - 1 for _, emitted in iterations])
    ms = ms_per_token(played, texts, tokens)
    return {
        "task": task,
        "policy": name,
        "ms_per_token": ms,
        "speedup": alone / median(ms),
        "acceptance": float(accepted.sum() / max(drafted.sum(), 1)),
        "sl_mean": float(drafted.mean()),
        "sl_sd": float(drafted.std()),
        "sl_histogram": dict(sorted(Counter(drafted.tolist()).items())),
    }


def against(mine: Played, other: Played, texts: Seq[Text], draws: int = 2000) -> list[float]:
    """Speed of `mine` over that of `other`, paired by text: 2.5%, 50% and 97.5% of a bootstrap over texts."""
    a, b = (np.array([median(p.seconds[text.name]) for text in texts]) for p in (mine, other))
    return list(paired_ratio(b, a, draws))


def best_of(found: dict[str, Played], names: Seq[str], texts: Seq[Text], tokens: int) -> str:
    return min(names, key=lambda name: median(ms_per_token(found[name], texts, tokens)))


def main() -> None:
    args = _arguments()
    config = EngineConfig(
        target=args.target, draft=args.draft, policy="static", heads=tuple(args.head),
        max_model_len=args.context, max_num_seqs=64, max_sl=LONGEST, threads=args.threads,
    )  # fmt: skip
    engine = Engine(config)
    tokenizer = load_tokenizer(args.target)
    validation, test = read_texts(args.tasks, tokenizer, args.validation, args.per_task, args.only)
    refused = engine.info.refusals["model"]
    rules = [name for name in RULES if name not in refused]
    for name in sorted(set(RULES) & set(refused)):
        console.print(f"{name} is left out: {refused[name]}")
    statics = {_named(each): each for each in map(static, STATIC)}
    joints = {_named(each): each for each in (joint(t, LONGEST) for t in THRESHOLDS)}
    every = {ALONE: SpeculationParams(drafter="none"), **statics, **joints}
    every |= {name: SpeculationParams(policy=name) for name in rules}
    for speculation in every.values():  # compiles, captures, learns the costs
        generate(engine, validation[:1], args.tokens, speculation, args.temperature)

    tuned = play(engine, validation, {**statics, **joints}, args, 1)
    sl = best_of(tuned, list(statics), validation, args.tokens)
    threshold = best_of(tuned, list(joints), validation, args.tokens)
    console.print(f"chosen on validation: {sl}, {threshold}")
    settings = {ALONE: every[ALONE], **statics, threshold: joints[threshold]}
    settings |= {name: every[name] for name in rules}
    part = args.json.with_suffix(".part")
    found = play(engine, test, settings, args, args.repeats, keep=part)
    longest = play(engine, test, {ORACLE: static(LONGEST)}, args, 1)[ORACLE]
    found[ORACLE] = oracle(engine, longest)
    timing = {"rounds": args.rounds, "context": min(512, engine.info.max_model_len - 40)}
    steps = {"static": draft_step(engine, "static", {}, **timing)}
    for name in (rule for rule in rules if rule != "heuristic"):  # last: the engine stops no more afterwards
        steps[name] = draft_step(engine, name, {}, overrule=True, **timing)
    rows, paired = _rows(found, test, list(statics), sl, args)
    of_predicted = {
        name: sum(predicted(engine, each) for each in played.iterations.values())
        / sum(times[-1] for times in played.seconds.values())
        for name, played in found.items()
        if name != ORACLE
    }
    different = {
        name: sum(played.tokens[t.name] != found[ALONE].tokens[t.name] for t in test)
        for name, played in found.items()
        if played.tokens
    }
    figures = {
        "pair": {"target": args.target, "draft": args.draft, "heads": list(args.head)},
        "temperature": args.temperature, "tokens": args.tokens, "per_task": args.per_task,
        "repeats": args.repeats, "chosen": {"static": sl, "confidence": threshold},
        "costs": {
            "draft": engine.costs.drafts["model"].cost(1, 1),
            "verify": {str(n): engine.costs.verify.cost(1, n) for n in (1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 25)},
        },
        "draft_step": steps, "of_predicted": of_predicted, "rows": rows, "goodput_against": paired,
        "texts_unlike_target_only": different,
        "seconds": {name: dict(played.seconds) for name, played in found.items()},
    }  # fmt: skip
    record.save(args.json, figures)
    part.unlink(missing_ok=True)
    _show(figures)


def _rows(
    found: dict[str, Played], test: list[Text], statics: list[str], sl: str, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The table, and goodput against the best of the others on each task, paired by prompt."""
    rows: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    for task in [*dict.fromkeys(text.task for text in test), "all"]:
        texts = [text for text in test if task in (text.task, "all")]
        alone = median(ms_per_token(found[ALONE], texts, args.tokens))
        hindsight = best_of(found, statics, texts, args.tokens)
        named = {CHOSEN: found[sl], HINDSIGHT: found[hindsight]}
        for name, played in (found | named).items():
            rows.append(row(name, task, played, texts, alone, args.tokens))
        if "goodput" in found:
            others = [name for name in found if name not in ("goodput", ORACLE, *statics)]
            best = best_of(found, others, texts, args.tokens)
            for name, other in ((best, found[best]), (hindsight, found[hindsight]), (ALONE, found[ALONE]),
                                (CHOSEN, found[sl]), (ORACLE, found[ORACLE])):  # fmt: skip
                paired.append(
                    {"task": task, "against": name, "speed": against(found["goodput"], other, texts)}
                )
    return rows, paired


def _show(figures: dict[str, Any]) -> None:
    rows = figures["rows"]
    tasks = list(dict.fromkeys(each["task"] for each in rows))
    table = Table(
        "policy", *tasks, "acceptance", "SL (sd)", title="ms per token (speed-up), median of repeats"
    )
    for name in dict.fromkeys(each["policy"] for each in rows):
        mine = {each["task"]: each for each in rows if each["policy"] == name}
        cells = [f"{median(mine[t]['ms_per_token']):.2f} ({mine[t]['speedup']:.2f})" for t in tasks]
        last = mine["all"]
        table.add_row(
            name, *cells, f"{last['acceptance']:.2f}", f"{last['sl_mean']:.1f} ({last['sl_sd']:.1f})"
        )
    console.print(table)
    told = ", ".join(f"{name} {share:.1%}" for name, share in figures["of_predicted"].items())
    console.print(f"time at the engine's costs, of the measured: {told}")
    for each in figures["goodput_against"]:
        low, mid, high = each["speed"]
        console.print(f"goodput on {each['task']}: {mid:.3f} [{low:.3f}, {high:.3f}] x {each['against']}")
    base = figures["draft_step"]["static"]["seconds"]
    for name, step in figures["draft_step"].items():
        over = (step["seconds"] - base) / base
        console.print(f"draft step under {name}: {1e3 * step['seconds']:.3f} ms, {over:+.1%} of static's")
    console.print("texts unlike target only:", json.dumps(figures["texts_unlike_target_only"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--head", action="append", default=[], help="a trained head; the shipped are found")
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--only", nargs="+", help="tasks; default: all in the file")
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--validation", type=int, default=3, help="prompts of a task")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=30, help="of the timing of draft steps")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/policies.json"))
    args = parser.parse_args()
    if torch.cuda.is_available() and args.threads is not None:
        parser.error("--threads is for CPUs")
    return args


if __name__ == "__main__":
    main()
