"""DISCO's decision in one launch; the torch that it must agree with is `engine/speculation/scoring.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _classify(
    top, entropy, position, slots, least, low, high, w1, b1, w2, b2, keep, units, TOP: tl.constexpr,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, f, u = tl.program_id(0), tl.arange(0, INPUTS), tl.arange(0, WIDTH)
    x = tl.load(top + row * TOP + f, f < TOP, 0.0)
    x = tl.where(f == TOP, tl.load(entropy + row), x)
    x = tl.where(f == TOP + 1, tl.load(position + row).to(tl.float32), x)
    real, inside = f < TOP + 2, u < units
    least_x, most_x = tl.load(low + f, real, 0.0), tl.load(high + f, real, 0.0)
    x = tl.where(x < least_x, least_x, tl.where(x > most_x, most_x, x))  # NaN stays
    weights = tl.load(w1 + f[:, None] * units + u[None], real[:, None] & inside[None], 0.0)
    hidden = tl.sum(x[:, None] * weights, 0) + tl.load(b1 + u, inside, 0.0)
    score = tl.sum(tl.where(hidden < 0, 0.0, hidden) * tl.load(w2 + u, inside, 0.0), 0) + tl.load(b2)
    tl.store(keep + row, (score >= tl.load(least + tl.load(slots + row))).to(tl.int8))


def decide(
    top: Tensor,
    entropy: Tensor,
    position: Tensor,
    slots: Tensor,
    least: Tensor,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """bool[B]: whether a row's log-odds of acceptance are at least its own `least`.

    top float32[B, 10], entropy float32[B], position int[B], slots int64[B], least float32[slots],
    weights as `Head.folded` gives them, of at most 1024 hidden units. NaN stops.
    """
    rows, words = top.shape
    units = weights["b1"].shape[0]
    keep = torch.empty(rows, dtype=torch.bool, device=top.device)
    _classify[(rows,)](
        top, entropy, position, slots, least, weights["low"], weights["high"], weights["w1"], weights["b1"],
        weights["w2"], weights["b2"], keep.view(torch.int8), units, TOP=words,
        INPUTS=triton.next_power_of_2(words + 2), WIDTH=triton.next_power_of_2(units),
        num_warps=1 if units <= 64 else 4,
    )  # fmt: skip
    return keep
