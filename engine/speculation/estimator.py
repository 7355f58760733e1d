"""How likely a draft and one more token are all accepted, learned from verdicts alone.

What a draft shows of itself is one number, the product of its largest probabilities; it is looked at
as log-odds. What that number is worth depends on the pair and on the texts, so it is read off a
curve: a few knots with counts of what came of drafts that stood there and went on. Whether one goes on
depends on the same number alone, so a knot's counts are not biased by drafts that stopped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOW, KNOTS = -6.0, 16
"""Knots lie at LOW, LOW + 1, ... in log-odds of the product."""
_FINE = 8  # places between two knots that the curve is read at
_INTERCEPT, _SLOPE, _CEILING = 0.5, 0.9, 0.98  # the prior, as drafts of a 0.5B for a 1.5B model stood
_STRENGTH = 6.0  # drafts that the prior counts for, at each knot
_MEMORY = 1 - 1 / 2000  # of the counts, when a draft is added: what is not seen again is forgotten
_OPTIMISM = 0.3  # deviations on top of what is known: a knot is tried before it is given up

CONSTANTS = {
    "FINE": _FINE,
    "LOW": LOW,
    "INTERCEPT": _INTERCEPT,
    "SLOPE": _SLOPE,
    "CEILING": _CEILING,
    "STRENGTH": _STRENGTH,
    "FADE": math.log2(_MEMORY),
    "OPTIMISM": _OPTIMISM,
}
"""For the kernel that does the same."""


class Curve(NamedTuple):
    """`seen`, `good` float32[KNOTS]: drafts counted, and those accepted.

    `chance` float32[(KNOTS - 1) * 8 + 1]: probabilities, read off at the logarithm of the product by
    `bounds` (as many less one). All change in place.
    """

    seen: Tensor
    good: Tensor
    chance: Tensor
    bounds: Tensor

    @classmethod
    def new(cls, device: torch.device) -> Curve:
        places = torch.arange((KNOTS - 1) * _FINE + 1, dtype=torch.float32, device=device) / _FINE + LOW
        between = places[:-1] + 0.5 / _FINE
        bounds = torch.nn.functional.logsigmoid(between)
        found = cls(torch.zeros(KNOTS, device=device), torch.zeros(KNOTS, device=device), places, bounds)
        found._draw()
        return found

    def read(self, log_joint: Tensor) -> Tensor:
        """Probabilities, at logarithms of the product."""
        return self.chance[torch.bucketize(log_joint, self.bounds)]

    def learn(self, log_joint: Tensor, accepted: Tensor, counts: Tensor) -> None:
        """Drafts by row: log-products float32[B, K] where they stood and may have gone on.

        accepted bool[B, K]: all up to the next token; `counts` bool[B, K]: which are to be counted, the
        others may hold anything.
        """
        log_joint = torch.where(counts, log_joint, -1.0).clamp(-20.0, -1e-6)
        at = log_joint - torch.log(1 - torch.exp(log_joint)) - LOW
        knots = torch.arange(KNOTS, dtype=torch.float32, device=at.device)
        near = (1 - (at.clamp(0, KNOTS - 1)[..., None] - knots).abs()).clamp(min=0)
        weight = (near * counts[..., None]).flatten(0, -2)  # [N, KNOTS]
        memory = _MEMORY ** counts.any(-1).sum()
        self.seen.copy_(memory * self.seen + weight.sum(0))
        self.good.copy_(memory * self.good + (weight * accepted.flatten()[:, None]).sum(0))
        self._draw()

    def _draw(self) -> None:
        """Posterior means, with a little of their deviation on top."""
        knots = torch.arange(KNOTS, dtype=torch.float32, device=self.seen.device)
        prior = (_INTERCEPT + _SLOPE * (knots + LOW)).sigmoid().clamp(max=_CEILING)
        known = self.seen + _STRENGTH
        mean = (self.good + _STRENGTH * prior) / known
        hoped = mean + _OPTIMISM * (mean * (1 - mean) / known).sqrt()
        odds = torch.logit(hoped, eps=1e-3)
        share = torch.arange(_FINE, device=odds.device) / _FINE
        fine = torch.lerp(odds[:-1, None], odds[1:, None], share[None]).flatten()
        self.chance.copy_(torch.cat([fine, odds[-1:]]).sigmoid())
