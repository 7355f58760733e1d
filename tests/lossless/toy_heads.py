"""Heads with made-up weights, for drafts that nobody trained one for."""

from __future__ import annotations

import torch

from engine.speculation.features import VERSION
from engine.speculation.heads import FORMAT, INPUTS_OF, KINDS, Calibration, Head, HeadOptions, Identity, Kind
from engine.speculation.scoring import width_of

DRAFT, TARGET = Identity("toy-draft", "d" * 64), Identity("toy-target", "a" * 64)


def toy_head(kind: Kind, hidden: int = 4, seed: int = 0, **changes: object) -> Head:
    """A head whose answers vary with its inputs; the larger the first input, the surer it is."""
    inputs = INPUTS_OF[kind]
    width = hidden if "hidden" in inputs else 0
    features = width_of(inputs, width)
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=source)

    weights = {
        "mean": normal(features),
        "std": normal(features).abs() + 0.5,
        "low": torch.full((features,), -100.0),
        "high": torch.full((features,), 100.0),
        "w2": normal(features),
        "b2": normal(1),
    }
    if kind in ("disco", "c2t"):
        # Around even odds where the first input is about a half; positions and steps count little.
        weights |= {"w1": 0.1 * normal(8, features), "b1": normal(8), "w2": torch.full((8,), 0.5)}
        weights |= {"mean": torch.zeros(features), "std": torch.ones(features)}
        weights["w1"][:, 0], weights["w1"][:, -1], weights["b2"][0] = 2.0, 0.005, -4.0
    elif kind == "specdec_pp":
        weights |= {"block": normal(features, features), "bias": normal(features)}
    else:
        weights["w2"][0] = 1.0
    told = {
        "format": FORMAT,
        "kind": kind,
        "feature_version": VERSION,
        "inputs": inputs,
        "judges": "drafted",
        "hidden": width,
        "depth": 3 if kind == "specdec_pp" else 0,
        "options": HeadOptions(threshold=0.6, max_sl=16, min_sl=2 if kind == "specdec_pp" else 0),
        "calibration": Calibration("platt", 1.3, -0.2),
        "draft": DRAFT,
        "target": TARGET,
        "data": {},
        "scores": {},
        "versions": {},
        "weights": weights,
    }
    head = Head(**(told | changes))  # type: ignore[arg-type]
    head.validate()
    return head


def toy_heads(hidden: int = 4) -> dict[str, Head]:
    """One of every kind."""
    return {kind: toy_head(kind, hidden) for kind in KINDS}
