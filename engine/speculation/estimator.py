"""How likely a draft and one more token are all accepted, learned from verdicts alone.

What a draft shows of itself is one number, the product of its largest probabilities; it is looked at
as log-odds. What that number is worth depends on the pair and on the texts, so it is read off a
curve: a few knots with counts of what came of drafts that stood there and went on. Whether one goes on
depends on the same number alone, so a knot's counts are not biased by drafts that stopped.

It depends on the temperature too: a sampled token fails where the two laws differ, however sure the
draft is, and stands now and then where it is not sure at all. So rows learn by class of temperature, a
curve each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOW, KNOTS = -6.0, 16
"""Knots lie at LOW, LOW + 1, ... in log-odds of the product."""
_FINE = 8  # places between two knots that the curve is read at
EDGES = (0.0, 0.5, 0.85)
"""Temperatures above which the next class begins: greedy, cool, as chats are (0.7), and 1 or more."""
CLASSES = len(EDGES) + 1
PRIORS = ((0.5, 0.9, 0.98), (0.2, 0.8, 0.97), (-0.1, 0.7, 0.96), (-0.5, 0.55, 0.95))
# By class, intercept and slope over the log-odds, and ceiling, as drafts stood: greedy ones of a 0.5B for
# a 1.5B model; sampled ones of the shipped pair, and of the other by the overlap of its laws.
STRENGTH = 6.0  # drafts that the prior counts for, at each knot
MEMORY = 1 - 1 / 2000  # of the counts, when a draft is added: what is not seen again is forgotten
_OPTIMISM = 0.3  # deviations on top of what is known: a knot is tried before it is given up

CONSTANTS = {
    "FINE": _FINE,
    "LOW": LOW,
    "STRENGTH": STRENGTH,
    "FADE": math.log2(MEMORY),
    "OPTIMISM": _OPTIMISM,
}
"""For the kernel that does the same."""


def classes(temperatures: Tensor) -> Tensor:
    """int64[B]: the class of each temperature."""
    return torch.stack([temperatures > edge for edge in EDGES]).sum(0)


class Curve(NamedTuple):
    """`seen`, `good` float32[C, KNOTS]: drafts counted, and those accepted, by class of temperature.

    `chance` float32[C, (KNOTS - 1) * 8 + 1]: probabilities, read off at the logarithm of the product by
    `bounds` (as many less one). These change in place. `prior` float32[C, KNOTS]: what is taken for
    likely before anything was seen.
    """

    seen: Tensor
    good: Tensor
    chance: Tensor
    bounds: Tensor
    prior: Tensor

    @classmethod
    def new(cls, device: torch.device) -> Curve:
        places = torch.arange((KNOTS - 1) * _FINE + 1, dtype=torch.float32, device=device) / _FINE + LOW
        bounds = torch.nn.functional.logsigmoid(places[:-1] + 0.5 / _FINE)
        knots = torch.arange(KNOTS, dtype=torch.float32, device=device) + LOW
        prior = torch.stack([(at + by * knots).sigmoid().clamp(max=top) for at, by, top in PRIORS])
        seen = torch.zeros_like(prior)
        found = cls(seen, seen.clone(), places.repeat(len(prior), 1), bounds, prior)
        found._draw()
        return found

    def read(self, log_joint: Tensor, kind: Tensor) -> Tensor:
        """Probabilities, at logarithms of the product float32[B], of rows of these classes int64[B]."""
        return self.chance[kind, torch.bucketize(log_joint, self.bounds)]

    def learn(self, log_joint: Tensor, accepted: Tensor, counts: Tensor, kind: Tensor) -> None:
        """Drafts by row: log-products float32[B, K] where they stood and may have gone on.

        accepted bool[B, K]: all up to the next token; `counts` bool[B, K]: which are to be counted, the
        others may hold anything; `kind` int64[B]: the rows' classes.
        """
        log_joint = torch.where(counts, log_joint, -1.0).clamp(-20.0, -1e-6)
        at = log_joint - torch.log(1 - torch.exp(log_joint)) - LOW
        knots = torch.arange(KNOTS, dtype=torch.float32, device=at.device)
        near = (1 - (at.clamp(0, KNOTS - 1)[..., None] - knots).abs()).clamp(min=0)
        weight = near * counts[..., None]  # [B, K, KNOTS]
        of = (kind == torch.arange(CLASSES, device=at.device)[:, None]).float()  # [C, B]
        memory = MEMORY ** (of @ counts.any(-1).float())[:, None]
        self.seen.copy_(memory * self.seen + of @ weight.sum(1))
        self.good.copy_(memory * self.good + of @ (weight * accepted[..., None]).sum(1))
        self._draw()

    def _draw(self) -> None:
        """Posterior means, with a little of their deviation on top."""
        known = self.seen + STRENGTH
        mean = (self.good + STRENGTH * self.prior) / known
        hoped = mean + _OPTIMISM * (mean * (1 - mean) / known).sqrt()
        odds = torch.logit(hoped, eps=1e-3)
        share = torch.arange(_FINE, device=odds.device) / _FINE
        fine = torch.lerp(odds[:, :-1, None], odds[:, 1:, None], share).flatten(1)
        self.chance.copy_(torch.cat([fine, odds[:, -1:]], 1).sigmoid())
