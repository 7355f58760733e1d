"""`disco-serve classifier export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from classifiers.commands._costs import DecideUs, DraftMs, TargetMs, Verify


def command(
    head: Annotated[Path, typer.Option(help="A trained head.")],
    out: Annotated[Path, typer.Option(help="Directory for KIND.json and KIND.safetensors.")],
    scores: Annotated[
        Path | None,
        typer.Option(help="The JSON of `evaluate`, or for c2t of `simulate-trees`: its scores go along."),
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="Tune threshold and cap anew on this trace. Repeatable.")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="With --trace: costs as JSON, or a benchmark's JSON that has them.")
    ] = None,
    draft_ms: DraftMs = None,
    target_ms: TargetMs = None,
    verify: Verify = None,
    decide_us: DecideUs = 0.0,
) -> None:
    """Put a head where it is served from, with its scores; or tune it for another machine's costs."""
    from classifiers.export import ExportOptions, export
    from classifiers.step_costs import costs_from

    given = costs is not None or draft_ms is not None or target_ms is not None
    options = ExportOptions(
        head=head,
        out=out,
        scores=scores,
        traces=tuple(trace or ()),
        costs=costs_from(costs, draft_ms, target_ms, verify, decide_us) if given else None,
    )
    export(options)
