"""disco-serve against transformers on this machine's CPU: same weights, dtype, threads and prompts.

    python benchmarks/cpu_pair.py [--draft default] [--per-category 12] [--tokens 128] [--json out.json]

Greedy, batch 1, held-out prompts, one after the other. Every prompt runs through every contender
before the next prompt, in a rotating order, so that a noisy machine is noisy for all. The figure of
a contender is the median over prompts of its best round's tokens per second. Outputs must be the
same token by token; a difference is reported and fails the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from contenders import COUNTS, Contender, disco_contenders, transformers_contenders
from record import save
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from classifiers.heldout import Prompt, prompts
from engine.models.load import resolve

Runs = dict[str, list[dict[str, Any]]]
"""By contender, one entry a prompt."""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    path = str(resolve(args.target))
    chosen = [each for each in prompts(args.per_category) if each.category in args.categories]
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [_encode(tokenizer, each) for each in chosen]
    contenders = {
        **transformers_contenders(args.target, args.draft, args.tokens, args.assisted),
        **disco_contenders(args.target, args.draft, args.tokens, args.sl),
    }
    for contender in contenders.values():
        contender(ids[0][:8])  # warm up
    runs = _measure(contenders, chosen, ids, args.rounds)
    floor = _floor(path)
    different = _differences(runs)
    _show(runs, args.categories, floor, different)
    figures = {
        "what": __doc__,
        "target": args.target,
        "draft": args.draft,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "floor_ms_per_token": floor * 1e3,
        "different": different,
        "median_tokens_per_second": {
            category: {name: _median(_of(run, category)) for name, run in runs.items()}
            for category in [*args.categories, "all"]
        },
        "runs": {name: [_figures(one) for one in run] for name, run in runs.items()},
    }
    save(args.json, figures)
    if different:
        raise SystemExit(f"outputs differ: {different}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default", help="default, ngram, self:N or a model")
    parser.add_argument("--sl", type=int, nargs="*", default=[1, 2, 3, 4, 5, 7], help="static lookaheads")
    parser.add_argument("--assisted", type=int, nargs="*", default=[3], help="SL of transformers' assistant")
    parser.add_argument("--categories", nargs="+", default=["code", "chat", "arithmetic", "writing"])
    parser.add_argument("--per-category", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/cpu_pair.json"))
    return parser.parse_args()


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if not prompt.chat:
        plain: list[int] = tokenizer(prompt.text)["input_ids"]
        return plain
    chat = [{"role": "user", "content": prompt.text}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids


def _measure(
    contenders: dict[str, Contender], chosen: list[Prompt], encoded: list[list[int]], rounds: int
) -> Runs:
    """By contender, one entry a prompt: its output, counts and the seconds of every round."""
    runs: Runs = {name: [] for name in contenders}
    names = list(contenders)
    for i, ids in enumerate(encoded):
        for name in names:
            facts = {"category": chosen[i].category, "prompt_tokens": len(ids), "seconds": []}
            runs[name].append(facts)
        for turn in range(rounds):
            shift = (i * rounds + turn) % len(names)
            for name in names[shift:] + names[:shift]:
                begin = time.perf_counter()
                output, counts = contenders[name](ids)
                runs[name][i]["seconds"].append(time.perf_counter() - begin)
                runs[name][i].update(counts, output=output, emitted=len(output))
        print(f"prompt {i + 1}/{len(encoded)}", flush=True)
    return runs


def _differences(runs: Runs) -> list[str]:
    """Contenders and prompts whose output is not that of plain transformers."""
    expected = [run["output"] for run in runs["transformers"]]
    return [f"{name}, prompt {i}" for name, all_of_it in runs.items() for i, run in enumerate(all_of_it)
            if run["output"] != expected[i]]  # fmt: skip


def _floor(path: str) -> float:
    """Seconds to read the weights once at this machine's read bandwidth: no decoder is faster at batch 1."""
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    numbers = torch.ones(size // 4)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return min(times)


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "output"}


def _speed(run: dict[str, Any]) -> float:
    speed: float = run["emitted"] / min(run["seconds"])
    return speed


def _of(runs: list[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    return [run for run in runs if category in (run["category"], "all")]


def _median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(_speed(run) for run in runs)


def _show(runs: Runs, categories: list[str], floor: float, different: list[str]) -> None:
    """One table a category: speed, and how it compares with SL=0 and with plain transformers."""
    for category in [*categories, "all"]:
        table = Table(
            *("contender", "median tok/s", "ms/token", "vs SL=0", "vs transformers"),
            *("emitted/pass", "acceptance", "same tokens"),
            title=category,
        )
        alone = _median(_of(runs["disco-serve, SL=0"], category))
        plain = _median(_of(runs["transformers"], category))
        for name, all_runs in runs.items():
            run = _of(all_runs, category)
            speed = _median(run)
            passes, drafted, accepted = (sum(r.get(count, 0) for r in run) for count in COUNTS)
            emitted = f"{sum(r['emitted'] - 1 for r in run) / passes:.2f}" if passes else "-"
            acceptance = f"{accepted / drafted:.2f}" if drafted else "-"
            same = "no" if any(each.startswith(f"{name}, prompt") for each in different) else "yes"
            table.add_row(
                *(name, f"{speed:.1f}", f"{1e3 / speed:.1f}", f"{speed / alone:.2f}x"),
                *(f"{speed / plain:.2f}x", emitted, acceptance, same),
            )
        table.add_row("floor: weights / read bandwidth", f"{1 / floor:.1f}", f"{floor * 1e3:.1f}")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
