"""disco-serve against transformers on this machine's CPU: same weights, dtype, threads and prompts.

    python benchmarks/cpu_pair.py [--tokens 128] [--rounds 2] [--json out.json]

Greedy, batch 1, one prompt after the other. Every prompt runs through every contender before the
next prompt, in a rotating order, so that a noisy machine is noisy for all. The figure of a
contender is the median over prompts of its best round's tokens per second. Outputs must be the
same token by token; a difference is reported and fails the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import save
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.load import resolve
from engine.types import GenerateRequest, SamplingParams, SpeculationParams

PROMPTS = [
    ("chat", "What is the capital of France, and what is it famous for?"),
    ("chat", "Give me three tips for sleeping better."),
    ("chat", "Explain how a bicycle stays upright."),
    ("rewrite", "Put in the past tense: The cat sits on the mat. The dog sees the cat. The cat runs away."),
    ("rewrite", "Correct the spelling: Teh quikc brown fox jumsp over the lazy dog. Teh dog sleeps."),
    ("summary", "Summarise: The river floods every spring. The village moved uphill in 1921. The old church "
     "stayed by the river and floods every spring, and the village repairs the old church every summer."),
    ("code", "Write a Python function that returns the n-th Fibonacci number."),
    ("code", "Write a Python class for a stack with push, pop and peek."),
    ("code", "Add type hints: def add(a, b): return a + b\ndef sub(a, b): return a - b\ndef mul(a, b):"),
    ("list", "List the months of the year with their number of days."),
    ("list", "Write the multiplication table of 7 from 1 to 12."),
    ("story", "Write a short story about a lighthouse keeper."),
]  # fmt: skip

Runs = dict[str, list[dict[str, Any]]]
"""By contender, one entry a prompt."""

Contender = Callable[[list[int]], tuple[list[int], dict[str, int]]]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    path = str(resolve(args.target))
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = []
    for _, text in PROMPTS[: args.prompts]:
        chat = [{"role": "user", "content": text}]
        ids.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    contenders = {**_transformers(path, args.tokens), **_disco(path, args.tokens)}
    for contender in contenders.values():
        contender(ids[0][:8])  # warm up
    runs = _measure(contenders, ids, args.rounds)
    floor = _floor(path)
    different = _differences(runs)
    _show(runs, floor, different)
    figures = {
        "what": __doc__,
        "target": args.target,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "floor_ms_per_token": floor * 1e3,
        "different": different,
        "median_tokens_per_second": {name: _median(run) for name, run in runs.items()},
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
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("out/cpu_pair.json"))
    return parser.parse_args()


def _transformers(path: str, tokens: int) -> dict[str, Contender]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def contender(**extra: Any) -> Contender:
        def run(ids: list[int]) -> tuple[list[int], dict[str, int]]:
            prompt = torch.tensor([ids])
            with torch.inference_mode():
                out = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                    max_new_tokens=tokens, min_new_tokens=tokens, **extra,
                )  # fmt: skip
            return out[0, len(ids) :].tolist(), {}

        return run

    return {
        "transformers": contender(),
        "transformers, prompt lookup 3": contender(prompt_lookup_num_tokens=3),
        "transformers, prompt lookup 10": contender(prompt_lookup_num_tokens=10),
    }


def _disco(path: str, tokens: int) -> dict[str, Contender]:
    engine = Engine(
        EngineConfig(target=path, draft="ngram", dtype="float32", device="cpu", prefix_cache=False)
    )
    params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)

    def contender(policy: str, **options: int) -> Contender:
        speculation = SpeculationParams(drafter="ngram", policy=policy, options=options)

        def run(ids: list[int]) -> tuple[list[int], dict[str, int]]:
            request = GenerateRequest(id="0", prompt_ids=tuple(ids), params=params, speculation=speculation)
            engine.add(request)
            out: list[int] = []
            counts = {"iterations": 0, "drafted": 0, "accepted": 0}
            while engine.has_work():
                for event in engine.step()[0]:
                    out.extend(event.token_ids)
                    for name in counts:
                        counts[name] += getattr(event, name)
            return out, counts

        return run

    static = {f"disco-serve, ngram, static SL={sl}": contender("static", sl=sl) for sl in (1, 2, 3, 5, 7)}
    return {
        "disco-serve, SL=0": contender("static", sl=0),
        **static,
        "disco-serve, ngram, heuristic": contender("heuristic"),
    }


def _measure(contenders: dict[str, Contender], prompts: list[list[int]], rounds: int) -> Runs:
    """By contender, one entry a prompt: its output, counts and the seconds of every round."""
    runs: Runs = {name: [] for name in contenders}
    names = list(contenders)
    for i, ids in enumerate(prompts):
        for name in names:
            runs[name].append({"kind": PROMPTS[i][0], "prompt_tokens": len(ids), "seconds": []})
        for turn in range(rounds):
            shift = (i * rounds + turn) % len(names)
            for name in names[shift:] + names[:shift]:
                begin = time.perf_counter()
                output, counts = contenders[name](ids)
                runs[name][i]["seconds"].append(time.perf_counter() - begin)
                runs[name][i].update(counts, output=output, emitted=len(output))
        print(f"prompt {i + 1}/{len(prompts)}", flush=True)
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


def _median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(_speed(run) for run in runs)


def _show(runs: Runs, floor: float, different: list[str]) -> None:
    table = Table("contender", "median tok/s", "ms/token", "vs transformers", "emitted/pass", "same tokens")
    base = _median(runs["transformers"])
    for name, run in runs.items():
        speed = _median(run)
        passes = sum(r.get("iterations", 0) for r in run)
        emitted = f"{sum(r['emitted'] - 1 for r in run) / passes:.2f}" if passes else "-"
        same = "no" if any(each.startswith(f"{name}, prompt") for each in different) else "yes"
        table.add_row(name, f"{speed:.1f}", f"{1e3 / speed:.1f}", f"{speed / base:.2f}x", emitted, same)
    table.add_row("floor: weights / read bandwidth", f"{1 / floor:.1f}", f"{floor * 1e3:.1f}", "", "", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
