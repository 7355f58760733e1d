"""The report's Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from classifiers.report_data import Row, Timing, value

_SCORES = ("auroc", "ece", "f1_reject", "precision_reject", "recall_reject", "f1_accept")
_ABLATED = ("auroc", "ece", "f1_reject", "ms_per_token_each", "ms_per_token_product")


def table(columns: Seq[str], rows: Seq[Seq[str]]) -> str:
    """A pipe table; the first column is words, the others are figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    text = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in text) + "\n"


def figure(given: Any, digits: int = 3) -> str:
    """A number, with its interval if it has one; nothing for one that is not there."""
    middle, low, high = value(given)
    if middle is None:
        return ""
    interval = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{middle:.{digits}f}{interval}"


def times(timing: Timing) -> str:
    """Milliseconds per token and speed-up: policies down, tasks across."""
    rows = [[timing.row(task, policy) for task in timing.tasks] for policy in timing.policies]
    return table(
        ["policy", *timing.tasks],
        [[policy, *map(_time, cells)] for policy, cells in zip(timing.policies, rows, strict=True)],
    )


def lookaheads(timing: Timing) -> str:
    """Mean SL, its deviation and the acceptance rate: policies down, tasks across."""
    rows = [[timing.row(task, policy) for task in timing.tasks] for policy in timing.policies]
    return table(
        ["policy", *timing.tasks],
        [[policy, *map(_lookahead, cells)] for policy, cells in zip(timing.policies, rows, strict=True)],
    )


def against(runs: Seq[Timing]) -> str:
    """Where a policy was both measured and simulated on a task, at one temperature."""
    rows = []
    for real in (each for each in runs if each.measured):
        for made in (each for each in runs if not each.measured and each.temperature == real.temperature):
            for row in real.rows:
                twin = made.row(row.task, row.policy)
                if twin is not None:
                    off = f"{100 * (twin.ms / row.ms - 1):+.1f}%"
                    rows.append([row.task, row.policy, f"{row.ms:.2f}", f"{twin.ms:.2f}", off, made.title])
    columns = ["task", "policy", "measured ms", "simulated ms", "off by", "simulation"]
    return table(columns, rows) if rows else ""


def scores(found: Seq[Mapping[str, Any]]) -> str:
    """Classifiers over all tasks, then AUROC and F1 of reject by task."""
    whole = [row for row in found if row.get("task", "all") == "all"]
    parts = [table(["classifier", *_SCORES], [[row["kind"], *_figures(row, _SCORES)] for row in whole])]
    tasks = [task for task in dict.fromkeys(row.get("task", "all") for row in found) if task != "all"]
    for name in ("auroc", "f1_reject") if tasks else ():
        cells = {(row["kind"], row.get("task")): figure(row.get(name)) for row in found}
        kinds = [kind for kind in dict.fromkeys(row["kind"] for row in found) if (kind, tasks[0]) in cells]
        rows = [[kind, *(cells.get((kind, task), "") for task in tasks)] for kind in kinds]
        parts += [f"{name} by task:\n", table(["classifier", *tasks], rows)]
    return "\n".join(parts)


def by_position(found: Mapping[str, Seq[Mapping[str, Any]]]) -> str:
    """AUROC by position in the text, of every classifier; bins by their lower ends."""
    bins = sorted({row["position"] for rows in found.values() for row in rows})
    if not bins:
        return ""
    lines = []
    for kind, rows in found.items():
        cells = {row["position"]: figure(row.get("auroc")) for row in rows}
        lines.append([kind, *(cells.get(at, "") for at in bins)])
    return "auroc by position in the text, from:\n\n" + table(["classifier", *map(str, bins)], lines)


def ablation(rows: Seq[Mapping[str, Any]]) -> str:
    """What inputs are worth."""
    if not rows:
        return ""
    names = [name for name in _ABLATED if any(name in row for row in rows)]
    lines = [[str(row.get("variant", row.get("left_out"))), *_figures(row, names)] for row in rows]
    return table(["inputs", *names], lines)


def matrix(rows: Seq[str], columns: Seq[str], cells: Seq[Seq[float | None]]) -> str:
    """Taught down, judged across."""
    lines = [[row, *map(figure, line)] for row, line in zip(rows, cells, strict=True)]
    return table(["taught on / judged on", *columns], lines)


def _figures(row: Mapping[str, Any], names: Seq[str]) -> list[str]:
    return [figure(row.get(name)) for name in names]


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" [{min(row.repeats):.2f} to {max(row.repeats):.2f}]" if len(row.repeats) > 1 else ""
    speedup = "" if row.speedup is None else f" ({row.speedup:.2f}x)"
    return f"{row.ms:.2f}{speedup}{spread}"


def _lookahead(row: Row | None) -> str:
    if row is None or row.sl_mean is None:
        return ""
    spread = "" if row.sl_sd is None else f" ± {row.sl_sd:.1f}"
    accepted = "" if row.acceptance is None else f", {row.acceptance:.2f}"
    return f"{row.sl_mean:.2f}{spread}{accepted}"
