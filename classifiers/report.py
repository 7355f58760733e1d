"""`disco-serve classifier report`: one Markdown page with tables and plots, of whatever figures there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from classifiers import report_tables as tables
from classifiers import report_trees as trees
from classifiers.report_data import ReportError, Timing, read, timings
from classifiers.simulate_trees_table import grid

PAGE = "report.md"
_MATRICES = {"auroc": "AUROC", "f1_reject": "F1 of reject", "ms_over_own": "ms per token over its own task's"}


class ReportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`simulate`, `trees` (of simulate-trees), `evaluate`, `grid`: JSON files of these commands and of the
    benchmark of policies."""

    out: Path
    simulate: tuple[Path, ...] = ()
    trees: tuple[Path, ...] = ()
    evaluate: tuple[Path, ...] = ()
    grid: tuple[Path, ...] = ()
    title: str = "Stop policies"

    def check(self) -> None:
        """Raises ReportError."""
        if not (self.simulate or self.trees or self.evaluate or self.grid):
            raise ReportError("nothing to report: give --simulate, --trees, --evaluate or --grid files")
        if self.out.exists() and not self.out.is_dir():
            raise ReportError(f"--out {self.out} is no directory")


def run(options: ReportOptions) -> Path:
    """Writes the page and its plots into a directory; the page's path. Raises ReportError, OSError.

    A section is there if one of the files has what it shows.
    """
    options.check()
    page = _Page(options.out)
    simulated = [(path, read(path, ("rows", "static"))) for path in options.simulate]
    measured = [(path, read(path, ("rows",))) for path in options.grid]
    judged = [(path, read(path, ("scores",))) for path in options.evaluate]
    grown = [(path, read(path, ("rows", "budgets", "depth"))) for path in options.trees]
    runs: list[Timing] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for path, found in measured:
        for timing in timings(path, found, measured=True):
            runs.append(timing)
            page.section(timing.title, _times(page, timing))
    for path, found in simulated:
        for timing in timings(path, found, measured=False):
            runs.append(timing)
            page.section(timing.title, _caption(found) + _times(page, timing) + _fixed(page, timing, found))
    page.section("Simulated against measured", tables.against(runs))
    for path, found in grown:
        page.section(f"{path.stem}: trees", _trees(page, found))
    for path, found in judged:
        page.section(f"{path.stem}: classifiers", _classifiers(page, found))
        page.section(f"{path.stem}: inputs", tables.ablation(found.get("ablation", [])))
        page.section(f"{path.stem}: transfer", _transfer(page, found.get("transfer") or {}))
    return page.write(options.title)


class _Page:
    """Sections so far, and the plots beside them. Raises ReportError without matplotlib."""

    def __init__(self, out: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ReportError("the plots need matplotlib: pip install -e '.[report]'")
        from classifiers import report_plots

        self.plots = report_plots
        self._out = out
        self._sections: list[str] = []
        self._count = 0

    def section(self, title: str, body: str) -> None:
        """Nothing if there is nothing to show."""
        if body:
            self._sections.append(f"## {title}\n\n{body}")

    def plot(self, name: str, draw: Callable[[Path], None]) -> str:
        """Draws into the next file; the Markdown that shows it."""
        self._count += 1
        file = f"{self._count:02d}-{name.replace(' ', '-')}.png"
        draw(self._out / file)
        return f"\n![{name}]({file})\n"

    def write(self, title: str) -> Path:
        path = self._out / PAGE
        path.write_text(f"# {title}\n\n" + "\n".join(self._sections), encoding="utf-8")
        return path


def _times(page: _Page, timing: Timing) -> str:
    body = "Milliseconds per token (speed-up over the target alone):\n\n" + tables.times(timing)
    body += page.plot("time per token", lambda path: page.plots.time_per_token(timing, path))
    body += "\nMean SL ± standard deviation, acceptance rate:\n\n" + tables.lookaheads(timing)
    if any(row.histogram for row in timing.rows):
        body += page.plot("lookaheads", lambda path: page.plots.lookaheads(timing, path))
    return body


def _trees(page: _Page, found: Mapping[str, Any]) -> str:
    panels = {title: grid(found, "all", name) for name, title in trees.FIGURES.items()}
    middle = found["budgets"][len(found["budgets"]) // 2]
    body = trees.caption(found)
    body += "\n".join(trees.by_budget(found, name) for name in trees.FIGURES)
    body += page.plot("trees by budget", lambda path: page.plots.by_budget(panels, path))
    return body + "\n" + trees.by_task(found, middle) + "\n" + trees.shapes(found, middle)


def _caption(found: Mapping[str, Any]) -> str:
    """What was played, and at which costs."""
    if "costs" not in found:
        return ""
    costs, trace = found["costs"], found.get("trace", {})
    names = " and ".join(str(trace.get(each, {}).get("name", "?")) for each in ("target", "draft"))
    return (
        f"{names}, {trace.get('mode', '?')}, {found.get('prompts', '?')} prompts ({found.get('part', '?')}); "
        f"a draft step {1e3 * costs['draft']:.3g} ms, a target pass {1e3 * costs['verify'][0][1]:.3g} ms.\n\n"
    )


def _fixed(page: _Page, timing: Timing, found: Mapping[str, Any]) -> str:
    """What only a simulation has: every static SL, and acceptance by place in the draft."""
    static, places, body = found["static"], found.get("places"), ""
    if curves := static.get("ms_per_token"):
        chosen = static.get("chosen")
        body += "" if chosen is None else f"\nThe static SL chosen on validation is {chosen}. "
        best = ", ".join(f"{task} {sl}" for task, sl in static.get("hindsight", {}).items())
        body += f"\nBest static SL in hindsight: {best}.\n"
        body += page.plot("static lookaheads", lambda path: page.plots.static_curves(timing, curves, path))
    if places:
        body += "\nAcceptance by place in the draft, of drafts of the largest SL:\n"
        body += page.plot("acceptance", lambda path: page.plots.acceptance_by_place(places, path))
    return body


def _classifiers(page: _Page, found: Mapping[str, Any]) -> str:
    body = tables.scores(found["scores"]) + "\n" + tables.by_position(found.get("by_position") or {})
    if curves := found.get("calibration"):
        body += "\nCalibration, by bins of equal counts:\n"
        body += page.plot("calibration", lambda path: page.plots.calibration(curves, path))
    return body


def _transfer(page: _Page, found: Mapping[str, Any]) -> str:
    body = ""
    columns = found.get("tasks", [])
    rows = found.get("rows", columns)
    named = {str(found.get("measure")): found["matrix"]} if "matrix" in found else {}
    for name, cells in {**named, **{name: found[name] for name in _MATRICES if name in found}}.items():
        title = _MATRICES.get(name, name)

        def draw(path: Path, cells: Any = cells, title: str = title) -> None:
            page.plots.heatmap(rows, columns, cells, title, path)

        body += f"{title}:\n\n{tables.matrix(rows, columns, cells)}{page.plot('transfer ' + name, draw)}\n"
    return body
