"""`disco-serve classifier evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from classifiers.commands._costs import CostsFile, DecideUs, DraftMs, TargetMs, Verify


def command(
    trace: Annotated[list[Path], typer.Option(help="Directory of a trace of the pair. Repeatable.")],
    json: Annotated[Path, typer.Option(help="File for the figures.")],
    head: Annotated[list[Path] | None, typer.Option(help="A trained head. Repeatable.")] = None,
    costs: CostsFile = None,
    draft_ms: DraftMs = None,
    target_ms: TargetMs = None,
    verify: Verify = None,
    decide_us: DecideUs = 0.0,
    draws: Annotated[int, typer.Option(help="Of prompts, with replacement, for the 95% intervals.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of what the ablation teaches.")] = 0,
    ablate: Annotated[
        bool, typer.Option(help="Also teach with inputs left out, and on one task for others.")
    ] = True,
) -> None:
    """Judge heads on unseen prompts: F1 of reject, AUROC, calibration, ablation, transfer, time per token."""
    from classifiers.evaluate import EvaluateOptions, evaluate
    from classifiers.step_costs import costs_from

    options = EvaluateOptions(
        traces=tuple(trace),
        heads=tuple(head or ()),
        costs=costs_from(costs, draft_ms, target_ms, verify, decide_us),
        json=json,
        draws=draws,
        seed=seed,
        ablate=ablate,
    )
    evaluate(options)
