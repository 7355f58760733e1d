"""`disco-serve classifier simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from classifiers.commands._costs import CostsFile, DecideUs, DraftMs, TargetMs, Verify


def command(
    trace: Annotated[list[Path], typer.Option(help="Directory of a trace. Repeatable.")],
    out: Annotated[Path, typer.Option(help="File for the figures as JSON.")],
    costs: CostsFile = None,
    draft_ms: DraftMs = None,
    target_ms: TargetMs = None,
    verify: Verify = None,
    decide_us: DecideUs = 0.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:JSON of its options. Repeatable; default: every policy."),
    ] = None,
    head: Annotated[list[Path] | None, typer.Option(help="A trained head. Repeatable.")] = None,
    part: Annotated[str, typer.Option(help="Prompts to judge on: test, validation, train or all.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of the split into these parts.")] = 0,
    tokens: Annotated[
        int | None, typer.Option(help="The most tokens of a text; default: as recorded.")
    ] = None,
    max_sl: Annotated[int, typer.Option(help="No policy drafts more in an iteration.")] = 24,
    oracle_sl: Annotated[int, typer.Option(help="Nor does the oracle.")] = 24,
    shuffle: Annotated[
        int | None, typer.Option(min=0, help="A seed for the order of prompts; default: the trace's.")
    ] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="The draft has read the prompts before (prefix cache).")
    ] = False,
) -> None:
    """Play every policy on a trace: its time per token at given costs, beside the oracle's."""
    from classifiers.simulate_run import SimulateOptions, run
    from classifiers.step_costs import costs_from

    given = locals() | {
        "traces": tuple(trace),
        "costs": costs_from(costs, draft_ms, target_ms, verify, decide_us),
        "policies": tuple(policy or ()),
        "heads": tuple(head or ()),
    }
    run(SimulateOptions(**{name: given[name] for name in SimulateOptions.__struct_fields__}))
