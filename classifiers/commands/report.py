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

    given = {"simulate": tuple(simulate or ()), "evaluate": tuple(evaluate or ()), "grid": tuple(grid or ())}
    print(run(ReportOptions(out=out, title=title, **given)))
