"""The tree drafters as losslessness tests ask for them."""

from __future__ import annotations

from lossless.coupled import tree
from lossless.toys import different

from engine.types import SpeculationParams

PAIR = different(3)
KINDS = {
    "layers": {"drafter": "dyspec", "threshold": 0.1},
    "greedy": {"drafter": "dyspec", "growth": "greedy"},
    "opt_tree": {"drafter": "opt_tree", "delta": 0.0},
    "goodput": {"drafter": "goodput_tree"},
    "c2t": {"drafter": "c2t", "threshold": 0.1},
}
WIDTHS = {"goodput": 1}  # what a row teaches changes the next one's trees: a replay needs its own engine
TOKENS = {"goodput": 3}  # which takes long


def asks(kind: str, budget: int, depth: int = 3, **options: object) -> SpeculationParams:
    return tree(**{**KINDS[kind], "budget": budget, "max_depth": depth, **options})  # type: ignore[arg-type]
