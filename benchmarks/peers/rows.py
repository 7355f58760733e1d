"""What runs of several settings over the same prompts come to: one row a category and setting."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One setting in one category, or in "all".

    `emitted_per_pass` is tokens by target pass, `acceptance` accepted by drafted tokens (None without a
    draft), `speedup` over plain generate, `different` the prompts whose tokens are not plain generate's.
    """

    category: str
    setting: str
    prompts: int
    tokens_per_second: float
    speedup: float
    emitted_per_pass: float
    acceptance: float | None
    different: int
    best: bool


@dataclass
class Run:
    """One prompt under one setting: its output's ids, seconds, and both models' forward passes."""

    category: str
    output: list[int]
    seconds: float
    target_passes: int
    draft_passes: int


def summarise(runs: Mapping[str, Sequence[Run]], plain: str) -> list[Row]:
    """Rows of runs by setting's name, each with the same prompts in the same order; `plain` is what the
    others are compared with."""
    expected = [run.output for run in runs[plain]]
    categories = list(dict.fromkeys(run.category for run in runs[plain]))
    rows = []
    for category in [*categories, "all"]:
        kept = [i for i, run in enumerate(runs[plain]) if category in (run.category, "all")]
        speeds = {each: _speed([of[i] for i in kept]) for each, of in runs.items()}
        best = max(speeds, key=speeds.__getitem__)
        for each, of in runs.items():
            chosen = [of[i] for i in kept]
            tokens, passes, drafted = _counts(chosen)
            rows.append(
                Row(
                    category=category,
                    setting=each,
                    prompts=len(chosen),
                    tokens_per_second=speeds[each],
                    speedup=speeds[each] / speeds[plain],
                    emitted_per_pass=tokens / passes,
                    acceptance=(tokens - passes) / drafted if drafted else None,
                    different=sum(of[i].output != expected[i] for i in kept),
                    best=each == best,
                )
            )
    return rows


def _counts(runs: Sequence[Run]) -> tuple[int, int, int]:
    """Tokens, target passes and drafted tokens: a draft's pass gives one token, a target's pass one
    more than it accepts."""
    tokens = sum(len(run.output) for run in runs)
    return tokens, sum(run.target_passes for run in runs), sum(run.draft_passes for run in runs)


def _speed(runs: Sequence[Run]) -> float:
    return statistics.median(len(run.output) / run.seconds for run in runs)


def show(rows: Sequence[Row], console: Console) -> None:
    """One table a category."""
    for category in dict.fromkeys(row.category for row in rows):
        columns = ("setting", "median tok/s", "vs plain", "emitted/pass", "acceptance", "different", "best")
        table = Table(*columns, title=category)
        for row in rows:
            if row.category == category:
                table.add_row(
                    *(row.setting, f"{row.tokens_per_second:.1f}", f"{row.speedup:.2f}x"),
                    *(
                        f"{row.emitted_per_pass:.2f}",
                        "-" if row.acceptance is None else f"{row.acceptance:.2f}",
                    ),
                    *(f"{row.different} of {row.prompts}", "best" if row.best else ""),
                )
        console.print(table)
