"""How every command is told what the steps of an iteration take; `classifiers.step_costs` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CostsFile = Annotated[Path | None, typer.Option(help="Costs as JSON, or a benchmark's JSON that has them.")]
DraftMs = Annotated[float | None, typer.Option(help="Instead of --costs: milliseconds of a draft step.")]
TargetMs = Annotated[float | None, typer.Option(help="Of a target pass over one token.")]
Verify = Annotated[
    str | None, typer.Option(help="Of target passes over more tokens, TOKENS:MS,...; default: the same.")
]
DecideUs = Annotated[float, typer.Option(help="Microseconds that asking a policy adds to a draft step.")]
