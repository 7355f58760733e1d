"""What a report says of `simulate-trees`: tables by budget and by task, and the plot of both figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from classifiers.report_tables import table
from classifiers.simulate_trees_table import grid

FIGURES = {"emitted_per_pass": "tokens per target pass", "ms_per_token": "ms per token"}
_INTERVALS = {"emitted_per_pass": "emitted_interval", "ms_per_token": "ms_interval"}


def caption(found: Mapping[str, Any]) -> str:
    """What was played, and at which costs."""
    costs, trace = found["costs"], found["trace"]
    verify = ", ".join(f"{1e3 * seconds:.3g} ms for {tokens}" for tokens, seconds in costs["verify"])
    layers = ", ".join(f"{1e3 * seconds:.3g} ms for {nodes}" for nodes, seconds in costs["layers"])
    names = " and ".join(trace[each]["name"] for each in ("target", "draft"))
    return (
        f"{names}, {trace['mode']}, {found['prompts']} prompts ({found['part']}); trees of at most "
        f"{found['depth']} layers. A draft step {1e3 * costs['draft']:.3g} ms"
        f"{f', a layer {layers} nodes' if layers else ''}; a target pass {verify} tokens; the target alone "
        f"{found['target_only_ms']:.3g} ms per token.\n\n"
    )


def by_budget(found: Mapping[str, Any], figure: str) -> str:
    """Drafters down, budgets across, of all prompts, with intervals."""
    budgets, lines = grid(found, "all", figure)
    _, intervals = grid(found, "all", _INTERVALS[figure])
    rows = [
        [
            name,
            *(f"{value:.2f} ({low:.2f} to {high:.2f})" for value, (low, high) in zip(line, own, strict=True)),
        ]
        for (name, line), own in zip(lines.items(), intervals.values(), strict=True)
    ]
    return table([FIGURES[figure], *map(str, budgets)], rows)


def by_task(found: Mapping[str, Any], budget: int) -> str:
    """Drafters down, tasks across: tokens per target pass at one budget."""
    tasks = list(dict.fromkeys(row["task"] for row in found["rows"]))
    cells = {(row["drafter"], row["task"]): row for row in found["rows"] if row["budget"] == budget}
    names = list(dict.fromkeys(name for name, _ in cells))
    rows = [[name, *(f"{cells[name, task]['emitted_per_pass']:.2f}" for task in tasks)] for name in names]
    return table([f"budget {budget}", *tasks], rows)


def shapes(found: Mapping[str, Any], budget: int) -> str:
    """At one budget: what an iteration verifies, accepts and drafts."""
    rows = [
        [
            row["drafter"],
            *(f"{row[name]:.2f}" for name in ("verified", "accepted", "draft_passes")),
            f"{row['unknown']:.1%}",
        ]
        for row in found["rows"]
        if row["task"] == "all" and row["budget"] == budget
    ]
    return table([f"budget {budget}", "verified", "accepted", "draft passes", "not in the trace"], rows)
