"""What a recording holds, as a table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from classifiers import traces
from classifiers.traces import Trace

_WIDTH = 132  # columns where stdout is no terminal


def acceptance(trace: Trace) -> dict[str, float]:
    """The share of positions, from a text's second on, at which the draft matched: by category, and "all"."""
    drafted = trace.steps.pos >= 1
    categories = np.array(trace.prompts.category)[trace.steps.prompt]
    chosen = {name: drafted & (categories == name) for name in dict.fromkeys(trace.prompts.category)}
    found = {name: where for name, where in {**chosen, "all": drafted}.items() if where.any()}
    return {name: float(trace.steps.match[where].mean()) for name, where in found.items()}


def show(directory: Path) -> None:
    """Prints the recording's table on stdout. Raises TraceError."""
    trace = traces.load(directory)
    manifest, rates = trace.manifest, acceptance(trace)
    table = Table("category", "prompts", "tokens", "draft matches", box=None)
    categories = np.array(trace.prompts.category)
    for name, rate in rates.items():
        here = np.ones(len(categories), bool) if name == "all" else categories == name
        positions = int(here[trace.steps.prompt].sum())
        table.add_row(name, str(here.sum()), str(positions), f"{rate:.3f}")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(f"{directory}: {manifest.target.name} and {manifest.draft.name}, {manifest.mode}")
    console.print(table)
    left = f"; {manifest.left_out} prompts did not fit and were left out" if manifest.left_out else ""
    console.print(f"{len(trace.branches.step)} branches of up to {manifest.branch} steps{left}")
