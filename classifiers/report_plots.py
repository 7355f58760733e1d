"""The plots of the report, as PNG files. matplotlib comes with `pip install -e '.[report]'`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from classifiers.report_data import Timing

_DPI = 110
_FEW = 20  # of a share that is shown
_ORACLE, _NONE = "oracle", "target only"


def time_per_token(timing: Timing, path: Path) -> None:
    """Bars of ms/token by policy, a panel for each task; the oracle as a line, repeats as a whisker."""
    names = [name for name in timing.policies if name != _ORACLE]
    height = 0.8 + 0.24 * len(names)
    figure, panels = _panels(timing.tasks, height)
    for axes, task in zip(panels, timing.tasks, strict=True):
        rows = {name: timing.row(task, name) for name in names}
        there = {name: row for name, row in rows.items() if row is not None}
        places = range(len(there))
        middle = [row.ms for row in there.values()]
        low = [row.ms - min(row.repeats) for row in there.values()]
        high = [max(row.repeats) - row.ms for row in there.values()]
        axes.barh(places, middle, xerr=[low, high], color="#7a9cc6", ecolor="#333333")
        labels = [textwrap.shorten(name, 34, placeholder=" ...") for name in there]
        axes.set_yticks(places, labels, fontsize=8)
        axes.invert_yaxis()
        oracle = timing.row(task, _ORACLE)
        if oracle is not None:
            axes.axvline(oracle.ms, color="#b03a2e", linestyle="--", linewidth=1.2)
        _label(axes, task, "ms per token (dashed: oracle)", "")
    _save(figure, path)


def lookaheads(timing: Timing, path: Path) -> None:
    """Shares of iterations by SL, a panel for each task, a line for each policy that has no fixed SL."""
    figure, panels = _panels(timing.tasks, 2.8)
    for axes, task in zip(panels, timing.tasks, strict=True):
        for name in timing.policies:
            row = timing.row(task, name)
            if row is None or not row.histogram or name == _NONE or name.startswith("static"):
                continue
            share = [count / max(sum(row.histogram), 1) for count in row.histogram]
            axes.plot(range(len(share)), share, marker=".", markersize=4, **_line(timing, name))
        _label(axes, task, "SL: tokens drafted in an iteration", "share of iterations")
    _legend_of_all(figure, panels)
    _save(figure, path)


def static_curves(timing: Timing, statics: Mapping[str, Seq[float]], path: Path) -> None:
    """ms/token by static SL, a panel for each task; the other policies and the oracle as lines across."""
    figure, panels = _panels(timing.tasks, 2.8)
    for axes, task in zip(panels, timing.tasks, strict=True):
        axes.plot(range(len(statics[task])), statics[task], color="#333333", marker=".", label="static SL")
        for name in timing.policies:
            row = timing.row(task, name)
            if row is not None and name != _NONE and not name.startswith("static"):
                axes.axhline(row.ms, **_line(timing, name))
        _label(axes, task, "static SL", "ms per token")
    _legend_of_all(figure, panels)
    _save(figure, path)


def acceptance_by_place(places: Mapping[str, Mapping[str, Seq[int]]], path: Path) -> None:
    """By place in the draft: that it stands with all before it, and that it stands if they do.

    The second only where at least `_FEW` drafts came so far.
    """
    figure, (both, alone) = _panels(("with all before it", "if all before it stand"), 3.0)
    for task, counts in places.items():
        drafted, accepted = counts["drafted"], counts["accepted"]
        at = [j for j in range(len(drafted)) if drafted[j]]
        both.plot([j + 1 for j in at], [accepted[j] / drafted[j] for j in at], marker=".", label=task)
        reached = [accepted[j - 1] if j else drafted[0] for j in at]
        known = [(j + 1, accepted[j] / tried) for j, tried in zip(at, reached, strict=True) if tried >= _FEW]
        alone.plot(*([each[k] for each in known] for k in (0, 1)), marker=".", label=task)
    for axes, title in ((both, "with all before it"), (alone, "if all before it stand")):
        axes.set_ylim(0, 1)
        _label(axes, title, "place in the draft", "accepted")
    _legend_of_all(figure, (both,))
    _save(figure, path)


def calibration(curves: Mapping[str, Seq[Mapping[str, float]]], path: Path) -> None:
    """Share accepted against the probability that was told, by bins; the diagonal is right."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    for name, points in curves.items():
        told = [each["predicted"] for each in points]
        axes.plot(told, [each["accepted"] for each in points], marker=".", linewidth=1, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _label(axes, "", "probability told", "share accepted")
    _legend_of_all(figure, (axes,))
    _save(figure, path)


def heatmap(rows: Seq[str], columns: Seq[str], cells: Seq[Seq[float | None]], title: str, path: Path) -> None:
    """A matrix with its numbers; what is not known stays white."""
    size = 1.6 + 0.9 * len(columns), 1.4 + 0.45 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    values = [[float("nan") if cell is None else cell for cell in row] for row in cells]
    known = [cell for row in cells for cell in row if cell is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell is not None:
                colour = "white" if cell - low < 0.55 * (high - low) else "black"
                axes.text(j, i, f"{cell:.3f}", ha="center", va="center", color=colour, fontsize=8)
    _label(axes, title, "judged on", "taught on")
    _save(figure, path)


def by_budget(panels: Mapping[str, tuple[Seq[int], Mapping[str, Seq[float]]]], path: Path) -> None:
    """A panel for each figure: a line for each drafter over the budgets; the oracle where there is room."""
    figure, axes = _panels(list(panels), 3.6)
    for each, (title, (budgets, lines)) in zip(axes, panels.items(), strict=True):
        for at, (name, line) in enumerate(lines.items()):
            look = {"color": "black"} if name == _ORACLE else {"color": colormaps["tab10"](at % 10)}
            chain = name == _ORACLE or name.startswith("static") or name == "disco"
            each.plot(budgets, line, marker=".", label=name, linestyle="--" if chain else "-", **look)
        high = max(max(line) for name, line in lines.items() if name != _ORACLE)
        if max(map(max, lines.values())) > 1.5 * high:  # it would press the others into one line
            each.set_ylim(top=1.2 * high)
        each.set_xscale("log", base=2)
        each.set_xticks(budgets, [str(budget) for budget in budgets])
        _label(each, "", "budget: nodes, or tokens of a chain", title)
    _legend_of_all(figure, axes)
    _save(figure, path)


def _line(timing: Timing, policy: str) -> dict[str, Any]:
    """How a policy's line looks on every plot: a colour of its own, black and dashed for the oracle."""
    if policy == _ORACLE:
        return {"label": policy, "linewidth": 1, "color": "black", "linestyle": "--"}
    colour = colormaps["tab20"](timing.policies.index(policy) % 20)
    return {"label": policy, "linewidth": 1, "color": colour}


def _panels(titles: Seq[str], height: float) -> tuple[Any, list[Any]]:
    """One row of axes for every two titles."""
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4.8 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[len(titles) :]:
        unused.set_visible(False)
    return figure, axes[: len(titles)]


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_of_all(figure: Any, panels: Seq[Any]) -> None:
    """One legend below the panels, of what any of them shows."""
    shown = {
        label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if shown:
        place = {"loc": "outside lower center", "ncols": min(len(shown), 5)}
        figure.legend(shown.values(), shown.keys(), fontsize=7, frameon=False, **place)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
