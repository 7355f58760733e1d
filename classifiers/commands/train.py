"""`disco-serve classifier train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from classifiers.commands._costs import CostsFile, DecideUs, DraftMs, TargetMs, Verify


def command(
    trace: Annotated[list[Path], typer.Option(help="Directory of a trace of the pair. Repeatable.")],
    kind: Annotated[str, typer.Option(help="disco, specdec_pp, c2t or logistic")],
    out: Annotated[
        Path,
        typer.Option(help="Directory of the head, KIND.json and KIND.safetensors; a killed run goes on."),
    ],
    costs: CostsFile = None,
    draft_ms: DraftMs = None,
    target_ms: TargetMs = None,
    verify: Verify = None,
    decide_us: DecideUs = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same head.")] = 0,
    widths: Annotated[
        str | None, typer.Option(help="Hidden widths to try, W,W,...; default: 16,32,64 (c2t: 48).")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="Of a logistic head, NAME,NAME,...; default: its six.")
    ] = None,
    depth: Annotated[int, typer.Option(help="Residual blocks of specdec_pp.")] = 3,
    reject_weight: Annotated[
        float | None, typer.Option(help="Of a rejection in the loss; default: 6 for specdec_pp, else 1.")
    ] = None,
    judges: Annotated[
        str, typer.Option(help="specdec_pp: drafted, fed, or auto (both where the trace allows).")
    ] = "auto",
    calibration: Annotated[str, typer.Option(help="platt, temperature or none")] = "platt",
    epochs: Annotated[int | None, typer.Option(help="Default: by kind.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 256,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: by kind.")] = None,
) -> None:
    """Teach a head on a trace; width and threshold are those of least time per token on validation."""
    import msgspec

    from classifiers.step_costs import costs_from
    from classifiers.train import train
    from classifiers.train_options import TrainOptions

    given = locals() | {
        "traces": [str(path) for path in trace],
        "costs": msgspec.to_builtins(costs_from(costs, draft_ms, target_ms, verify, decide_us)),
        "widths": [int(word) for word in widths.split(",")] if widths else [],
        "inputs": inputs.split(",") if inputs else [],
        "out": str(out),
    }
    asked = {name: given[name] for name in TrainOptions.__struct_fields__}
    train(msgspec.convert(asked, TrainOptions, dec_hook=lambda kind, value: kind(value)))
