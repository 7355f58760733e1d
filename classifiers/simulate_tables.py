"""What simulation reports: rows by task and policy, figures of iterations, and their table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from classifiers.head_metrics import paired_ratio
from classifiers.simulate import Iterations

TARGET, CHOSEN, HINDSIGHT, ORACLE = (
    "target only",
    "static, chosen on validation",
    "static, best in hindsight",
    "oracle",
)
_SAMPLES = 1000  # of the bootstrap over prompts
_WIDTH = 140  # columns of the table where stdout is no terminal


@dataclass
class Played:
    """What was played: iterations by label; the static lookaheads by SL."""

    policies: dict[str, Iterations]
    statics: list[Iterations]
    options: dict[str, tuple[str, dict[str, Any]]]  # by label: the policy's name, its options
    skipped: dict[str, str]


def tables(
    played: Played, categories: Seq[str], judged: Seq[int], chosen: int | None, max_sl: int
) -> dict[str, Any]:
    """Rows by task and policy, the static lookaheads, and sums by prompt.

    `places`: of drafts of `max_sl` tokens, how many had a token number 1, 2, ... and of how many it stood
    with all before it.
    """
    tasks: dict[str, list[int]] = {}
    for prompt in (prompt for prompt in judged if prompt in played.statics[0].prompt):  # of 2 tokens or more
        tasks.setdefault(categories[prompt], []).append(prompt)
    if len(tasks) > 1:
        tasks["all"] = [prompt for prompts in tasks.values() for prompt in prompts]
    rows: list[dict[str, Any]] = []
    statics: dict[str, list[float]] = {}
    hindsight: dict[str, int] = {}
    places: dict[str, dict[str, list[int]]] = {}
    for task, prompts in tasks.items():
        by_sl = [each.of(prompts) for each in played.statics]
        statics[task] = [ms_per_token(each) for each in by_sl]
        hindsight[task] = int(np.argmin(statics[task]))
        best = by_sl[hindsight[task]]
        longest = figures(by_sl[max_sl], max_sl)
        places[task] = {"drafted": longest["drafted_at"], "accepted": longest["accepted_at"]}
        given = {label: each.of(prompts) for label, each in played.policies.items()}
        oracle = given.pop(ORACLE)
        if chosen is not None:
            given[CHOSEN] = by_sl[chosen]
        given |= {HINDSIGHT: best, ORACLE: oracle}
        for label, each in given.items():
            name, told = played.options.get(label, (label, {}))
            if label in (CHOSEN, HINDSIGHT):
                name, told = "static", {"sl": chosen if label == CHOSEN else hindsight[task]}
            row = {"task": task, "policy": label, "name": name, "options": told}
            row |= figures(each, max_sl) | {"speedup": statics[task][0] / ms_per_token(each)}
            rows.append(row | {"against_best_static": _paired(best, each, prompts)})
    sums = {label: _sums(each, judged) for label, each in played.policies.items()}
    return {
        "rows": rows,
        "static": {"chosen": chosen, "hindsight": hindsight, "ms_per_token": statics},
        "places": places,
        "by_prompt": {
            "prompt": list(judged),
            "task": [categories[prompt] for prompt in judged],
            "tokens": sums[TARGET][:, 1].astype(int).tolist(),
            "seconds": {label: each[:, 0].tolist() for label, each in sums.items()},
        },
        "skipped": played.skipped,
    }


def figures(played: Iterations, max_sl: int) -> dict[str, Any]:
    """Of all iterations: time per token after the first, SL, acceptance, also by place in the draft.

    `drafted_at[j]`: iterations that drafted a token number j + 1; `accepted_at[j]`: of these, those where it
    stood with all before it. `sl_histogram[k]`: iterations that drafted k.
    """
    drafted, accepted = int(played.drafted.sum()), int(played.accepted.sum())
    places = np.arange(1, max_sl + 1)[:, None]
    return {
        "ms_per_token": [ms_per_token(played)],
        "acceptance": accepted / drafted if drafted else None,
        "sl_mean": float(played.drafted.mean()),
        "sl_sd": float(played.drafted.std()),
        "sl_histogram": np.bincount(played.drafted, minlength=max_sl + 1).tolist(),
        "tokens": int(played.emitted.sum()),
        "iterations": len(played.drafted),
        "drafted": drafted,
        "accepted": accepted,
        "drafted_at": (played.drafted >= places).sum(1).tolist(),
        "accepted_at": (played.accepted >= places).sum(1).tolist(),
        "truncated": int(played.truncated.sum()),
    }


def ms_per_token(played: Iterations) -> float:
    """Milliseconds per token after the first."""
    return float(1e3 * played.seconds.sum() / played.emitted.sum())


def _sums(played: Iterations, prompts: Seq[int]) -> np.ndarray:
    """float64[prompts, 2]: seconds and tokens of every prompt."""
    size = max(prompts) + 1
    sums = [np.bincount(played.prompt, each, size) for each in (played.seconds, played.emitted)]
    found: np.ndarray = np.stack(sums, 1)[np.asarray(prompts)]
    return found


def _paired(base: Iterations, other: Iterations, prompts: Seq[int]) -> list[float]:
    """How much faster `other` is than `base` on the same prompts, as `paired_ratio`."""
    of_base, of_other = _sums(base, prompts)[:, 0], _sums(other, prompts)[:, 0]
    return list(paired_ratio(of_base, of_other, _SAMPLES))


def show(found: Mapping[str, Any]) -> None:
    """The rows as one table on stdout."""
    columns = ("ms/token", "speed-up", "accepted", "SL", "sd", "to best static (95%)")
    table = Table("task", Column("policy", no_wrap=True), *columns)
    last = None
    for row in found["rows"]:
        if last not in (None, row["task"]):
            table.add_section()
        last = row["task"]
        rate = "-" if row["acceptance"] is None else f"{row['acceptance']:.3f}"
        low, middle, high = row["against_best_static"]
        own = f"{row['policy']} (SL {row['options']['sl']})" if row["policy"].startswith("static,") else None
        figures = (
            *(f"{row['ms_per_token'][0]:.2f}", f"{row['speedup']:.2f}", rate),
            *(f"{row['sl_mean']:.2f}", f"{row['sl_sd']:.2f}", f"{middle:.3f} ({low:.3f}-{high:.3f})"),
        )
        table.add_row(row["task"], own or row["policy"], *figures)
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(highlight=False, markup=False, width=width)
    console.print(table)
    if found["left_out"]:
        console.print(f"left out: {found['left_out']} test prompts that a head has seen")
    for name, reason in found["skipped"].items():
        console.print(f"not played: {name}: {reason}")
