"""What `disco-serve classifier train` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from classifiers.step_costs import StepCosts
from engine.speculation.heads import INPUTS_OF, Kind
from engine.speculation.scoring import INPUTS

Judges = Literal["auto", "drafted", "fed"]
WIDTHS: dict[Kind, tuple[int, ...]] = {
    "disco": (16, 32, 64),
    "c2t": (48,),
    "specdec_pp": (0,),
    "logistic": (0,),
}
"""C2T's is published; the others have no hidden layer of their own."""


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`None` leaves to the kind: epochs and lr; `widths` of an FFN; `inputs` of a logistic head."""

    traces: tuple[Path, ...]
    kind: Kind
    out: Path
    costs: StepCosts
    seed: int = 0
    widths: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()
    depth: int = 3
    reject_weight: float | None = None
    judges: Judges = "auto"
    calibration: Literal["none", "temperature", "platt"] = "platt"
    epochs: int | None = None
    batch: int = 256
    lr: float | None = None

    def check(self) -> None:
        """Raises ValueError naming the option that cannot be."""
        for option, good, wanted in (
            ("--trace", len(self.traces) > 0, "at least one trace"),
            ("--widths", all(1 <= width <= 1024 for width in self.widths), "widths from 1 to 1024"),
            ("--widths", not self.widths or 0 not in WIDTHS[self.kind], "no width for this kind"),
            ("--inputs", not self.inputs or self.kind == "logistic", "no inputs but for kind logistic"),
            ("--inputs", set(self.inputs) <= INPUTS.keys(), f"names of {', '.join(INPUTS)}"),
            ("--judges", self.judges == "auto" or self.kind == "specdec_pp", "only for kind specdec_pp"),
            ("--depth", 1 <= self.depth <= 16, "1 to 16 blocks"),
            ("--reject-weight", (self.reject_weight or 1) > 0, "a positive weight"),
            ("--epochs", self.epochs is None or self.epochs >= 1, "at least one epoch"),
            ("--batch", self.batch >= 1, "at least one row"),
            ("--lr", self.lr is None or 0 < self.lr < 1, "a rate between 0 and 1"),
        ):
            if not good:
                raise ValueError(f"{option}: {wanted}")

    def read(self) -> tuple[str, ...]:
        """The names of the inputs that the head reads."""
        return self.inputs or INPUTS_OF[self.kind]
