"""`disco-serve classifier simulate-trees`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from classifiers.commands._costs import CostsFile, DecideUs, DraftMs, TargetMs, Verify


def command(
    trace: Annotated[list[Path], typer.Option(help="Directory of a trace made with --trees. Repeatable.")],
    out: Annotated[Path, typer.Option(help="File for the figures as JSON.")],
    costs: CostsFile = None,
    draft_ms: DraftMs = None,
    target_ms: TargetMs = None,
    verify: Verify = None,
    decide_us: DecideUs = 0.0,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:JSON of its options. Repeatable; default: every tree drafter."),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Nodes that the target verifies, N,N,...")] = "4,8,16,32,64",
    depth: Annotated[int, typer.Option(help="The most draft passes of an iteration.")] = 12,
    head: Annotated[list[Path] | None, typer.Option(help="A trained head. Repeatable.")] = None,
    part: Annotated[str, typer.Option(help="Prompts to judge on: test, validation, train or all.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of the split into these parts.")] = 0,
    tokens: Annotated[
        int | None, typer.Option(help="The most tokens of a text; default: as recorded.")
    ] = None,
) -> None:
    """Grow trees on a trace: tokens per target pass and time by budget, beside chains and the oracle."""
    import msgspec

    from classifiers.simulate import SimulateError
    from classifiers.simulate_trees import SimulateTreesOptions, run
    from classifiers.simulate_trees_table import show
    from classifiers.step_costs import costs_from

    given = locals() | {
        "traces": [str(path) for path in trace],
        "costs": msgspec.to_builtins(costs_from(costs, draft_ms, target_ms, verify, decide_us)),
        "drafters": drafter or [],
        "heads": [str(path) for path in head or ()],
        "out": str(out),
    }
    try:
        given["budgets"] = [int(word) for word in budgets.split(",")]
    except ValueError as error:
        raise SimulateError(f"--budgets {budgets!r}: numbers set apart by commas") from error
    asked = {name: given[name] for name in SimulateTreesOptions.__struct_fields__}
    show(run(msgspec.convert(asked, SimulateTreesOptions, dec_hook=lambda kind, value: kind(value))))
