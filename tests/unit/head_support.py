"""What tests of heads share: made-up signals, and a head's score step by step."""

from __future__ import annotations

from typing import Any

import torch

from engine.speculation.features import TOP
from engine.speculation.heads import Head
from engine.speculation.policy import Signals

CPU = torch.device("cpu")
HIDDEN = 4


def shown(rows: int, step: int = 1, seed: int = 0, **changes: Any) -> Signals:
    source = torch.Generator().manual_seed(seed)
    top = torch.rand(rows, TOP, generator=source).sort(descending=True).values
    top = top / top.sum(-1, keepdim=True) * 0.9
    told = {
        "step": torch.tensor(step),
        "token": torch.zeros(rows, dtype=torch.int64),
        "position": torch.arange(rows) * 3 + step,
        "alive": torch.ones(rows, dtype=torch.bool),
        "prob": top[:, 0],
        "largest": top[:, 0],
        "top": top,
        "entropy": -(top * top.log()).sum(-1),
        "joint": top[:, 0] ** step,
        "hidden": torch.randn(rows, HIDDEN, generator=source),
    }
    return Signals(**(told | changes))


def plain_score(head: Head, x: torch.Tensor) -> torch.Tensor:
    """The head's log-odds, step by step as the format says, in float64."""
    w = {name: value.double() for name, value in head.weights.items()}
    x = (x.double().clamp(w["low"], w["high"]) - w["mean"]) / w["std"]
    if head.kind in ("disco", "c2t"):
        x = torch.relu(x @ w["w1"].T + w["b1"])
    if head.kind == "specdec_pp":
        for _ in range(head.depth):
            z = x @ w["block"].T + w["bias"]
            x = x + z * torch.sigmoid(z)
    z = x @ w["w2"] + w["b2"]
    return z / head.calibration.temperature + head.calibration.bias
