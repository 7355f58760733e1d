"""Throughput against latency, as a picture. Needs matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path

from server.bench.figures import Level
from server.bench.report import Report, name_of
from server.log_lines import one_line


class PlotError(Exception):
    """There is nothing to draw with."""


def check() -> None:
    """Raises PlotError if matplotlib is missing: told before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError("--plot wants matplotlib: pip install -e '.[report]'") from error


def draw(report: Report, path: Path) -> None:
    """Writes a picture with a panel each for TTFT, TPOT and E2E over output tokens a second.

    Levels without a good request have no point. Raises OSError, and ValueError for an unknown suffix.
    """
    from matplotlib.figure import Figure

    levels = [level for level in report.levels if level.good]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3), ("ttft", "tpot", "e2e"), strict=True):
        for percent, style in (("p50", "o-"), ("p90", "s--"), ("p99", "^:")):
            points = [
                (level, value) for level in levels if (value := _value(level, kind, percent)) is not None
            ]
            axes.plot(
                [level.output_tokens_per_second for level, _ in points],
                [value for _, value in points],
                style,
                label=percent,
            )
            if percent == "p50":
                for level, value in points:
                    where = (level.output_tokens_per_second, value)
                    axes.annotate(
                        name_of(level), where, textcoords="offset points", xytext=(4, 4), fontsize=8
                    )
        axes.set(xlabel="output tokens/s", ylabel=f"{kind.upper()}, ms", ylim=(0, None))
        axes.legend()
    what = "requests/s" if any(level.rate is not None for level in levels) else "concurrency"
    title = one_line(f"{report.about.model}, {report.about.kind}: points are named by {what}")
    figure.suptitle(title, fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _value(level: Level, kind: str, percent: str) -> float | None:
    spread = getattr(level, f"{kind}_ms")
    return None if spread is None else float(getattr(spread, percent))
