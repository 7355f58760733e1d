"""What `simulate-trees` shows: a table on the terminal, and the same in a report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_WIDTH = 140  # columns of the table where stdout is no terminal


def grid(found: Mapping[str, Any], task: str, figure: str) -> tuple[list[int], dict[str, list[Any]]]:
    """Budgets, and by drafter one figure for each."""
    lines: dict[str, dict[int, Any]] = {}
    for row in found["rows"]:
        if row["task"] == task:
            lines.setdefault(row["drafter"], {})[row["budget"]] = row[figure]
    budgets = list(found["budgets"])
    return budgets, {name: [line[budget] for budget in budgets] for name, line in lines.items()}


def show(found: Mapping[str, Any]) -> None:
    """Tokens per target pass, and ms per token, of all prompts, by drafter and budget."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for figure, title in (
        ("emitted_per_pass", "tokens per target pass"),
        ("ms_per_token", "ms per token"),
    ):
        budgets, lines = grid(found, "all", figure)
        columns = [Column(str(budget), justify="right") for budget in budgets]
        table = Table("drafter", *columns, title=f"{title}, by budget")
        for name, line in lines.items():
            table.add_row(name, *(f"{value:.2f}" for value in line))
        console.print(table)
    for label, reason in found["skipped"].items():
        console.print(f"left out: {label}: {reason}", highlight=False, soft_wrap=True)
    unknown = max((row["unknown"] for row in found["rows"]), default=0.0)
    console.print(
        f"{found['prompts']} prompts; target alone {found['target_only_ms']:.2f} ms; of the nodes that trees "
        f"went on from, at most {unknown:.1%} were not in the trace",
        highlight=False,
        soft_wrap=True,
    )
