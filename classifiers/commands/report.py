"""`disco-serve classifier report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option(help="Directory for report.md and its plots.")],
    simulate: Annotated[
        list[Path] | None, typer.Option(help="JSON of `classifier simulate`. Repeatable.")
    ] = None,
    trees: Annotated[
        list[Path] | None, typer.Option(help="JSON of `classifier simulate-trees`. Repeatable.")
    ] = None,
    evaluate: Annotated[
        list[Path] | None, typer.Option(help="JSON of `classifier evaluate`. Repeatable.")
    ] = None,
    grid: Annotated[
        list[Path] | None, typer.Option(help="JSON of benchmarks/policies.py. Repeatable.")
    ] = None,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Stop policies",
) -> None:
    """Put figures on one page, with plots: time per token, lookaheads, acceptance, calibration, transfer."""
    from classifiers.report import ReportOptions, run

    files = {"simulate": simulate, "trees": trees, "evaluate": evaluate, "grid": grid}
    given = {name: tuple(paths or ()) for name, paths in files.items()}
    print(run(ReportOptions(out=out, title=title, **given)))
