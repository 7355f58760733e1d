"""What a head reads and how it scores: the same functions teach it and serve it.

A score is a log-odds: that a draft token is accepted, given that all before it in this draft were.
Plain torch, few operations, no read-back: it is captured into the graph of a draft step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.speculation.features import TOP
from engine.speculation.policy import Need, Signals

_TINY = 1e-6


class Input(NamedTuple):
    """`width` columns (None: the draft's hidden width) read from signal `need` (None: always there)."""

    need: Need | None
    width: int | None
    read: Callable[[Signals], Tensor]  # float32[B] or float32[B, width]


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _log_odds(prob: Tensor) -> Tensor:
    return torch.logit(prob, eps=_TINY)


def _entropy_top(signals: Signals) -> Tensor:
    top = _given(signals.top)
    share = top / top.sum(-1, keepdim=True).clamp(min=_TINY)
    found: Tensor = -torch.special.xlogy(share, share).sum(-1)
    return found


INPUTS: dict[str, Input] = {
    "top": Input("top", TOP, lambda s: _given(s.top)),
    "entropy": Input("entropy", 1, lambda s: _given(s.entropy)),
    "entropy_top": Input("top", 1, _entropy_top),  # of the ten largest, renormalised
    "position": Input(None, 1, lambda s: s.position.float()),
    "step": Input(None, 1, lambda s: s.step.float().expand(s.position.shape)),
    "prob": Input("prob", 1, lambda s: _given(s.prob)),
    "largest": Input("largest", 1, lambda s: _given(s.largest)),
    "joint": Input("joint", 1, lambda s: _given(s.joint)),
    "logit_prob": Input("prob", 1, lambda s: _log_odds(_given(s.prob))),
    "logit_largest": Input("largest", 1, lambda s: _log_odds(_given(s.largest))),
    "log_joint": Input("joint", 1, lambda s: _given(s.joint).clamp(min=_TINY).log()),
    "log_position": Input(None, 1, lambda s: s.position.float().log1p()),
    "hidden": Input("hidden", None, lambda s: _given(s.hidden)),
}


def needs_of(inputs: Seq[str]) -> frozenset[Need]:
    """The signals that these inputs are read from."""
    return frozenset(need for name in inputs if (need := INPUTS[name].need) is not None)


def width_of(inputs: Seq[str], hidden: int) -> int:
    """Columns of `inputs_of`."""
    return sum(width if (width := INPUTS[name].width) is not None else hidden for name in inputs)


def inputs_of(signals: Signals, inputs: Seq[str]) -> Tensor:
    """float32[B, F], the inputs side by side in the order given."""
    columns = [INPUTS[name].read(signals) for name in inputs]
    if len(columns) == 1 and columns[0].ndim == 2:
        return columns[0]
    return torch.cat([c if c.ndim == 2 else c[:, None] for c in columns], dim=1)


def score(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """float32[B]: calibrated log-odds of rows x float32[B, F], by weights as `Head.folded` gives them.

    `low`, `high` [F] bound x to what was seen in training: a text far longer than those must not
    push a head to where it knows nothing. Then one of
    - FFN: `w1` [F, W], `b1` [W], relu, `w2` [W], `b2` [1];
    - residual: `scale`, `shift`, `bias`, `w2` [F], `blocks` [D, F, F] of x + silu(x A + b), `b2` [1];
    - linear: `w2` [F], `b2` [1].
    """
    x = torch.clamp(x, weights["low"], weights["high"])
    if "w1" in weights:
        x = torch.addmm(weights["b1"], x, weights["w1"]).relu_()
    elif "blocks" in weights:
        x = torch.addcmul(weights["shift"], x, weights["scale"])
        for block in weights["blocks"].unbind(0):
            x = x + F.silu(torch.addmm(weights["bias"], x, block))
    return torch.addmv(weights["b2"], x, weights["w2"])
