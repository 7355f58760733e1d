"""How a goodput tree grows: a node is taken while it pays for its place in the target's pass, a layer while
it pays for a pass of the draft. Ours; the economics are those of `policies/goodput.py`.

With r the tokens per second that the batch emits, a node that stands with chance c is worth c tokens and
costs r times what one more token makes the target's pass longer; a layer costs r times a draft pass. Where
places cost next to nothing, each must still be worth its share of the budget, which is for all layers.

A chance is read off the product of the draft's probabilities along the way, by a curve that is learned
from every node that was judged: it stood, or it did not. Of a follower that is still to be drawn only the
expected probability is known, and only that is asked: what is drawn stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from typing import Any

import torch

from engine.speculation.estimator import CLASSES, KNOTS, LOW, MEMORY, PRIORS, STRENGTH
from engine.speculation.tree import NOTHING, Followers, Growth, Opening

_YIELD = 0.7  # of a layer's chances, what the layer behind it adds, before anything was seen
_SLOW = 0.1  # weight of what was just seen


class Chances:
    """P(the target goes through a node) by the product of the draft's probabilities, a curve for each class
    of temperature. `seen`, `good` float32[CLASSES, KNOTS]: nodes counted, and those that stood.
    """

    def __init__(self) -> None:
        self.tensors = {name: torch.zeros(CLASSES, KNOTS) for name in ("seen", "good")}
        self._seen, self._good = (each.numpy() for each in self.tensors.values())

    def read(self, joint: float, kind: int) -> float:
        at, share = _place(joint)
        return (1 - share) * self._knot(kind, at) + share * self._knot(kind, at + 1)

    def learn(self, joints: Seq[float], stood: Seq[bool], kind: int) -> None:
        self._seen[kind] *= MEMORY
        self._good[kind] *= MEMORY
        for joint, good in zip(joints, stood, strict=True):
            at, share = _place(joint)
            for knot, weight in ((at, 1 - share), (at + 1, share)):
                self._seen[kind, knot] += weight
                self._good[kind, knot] += weight * good

    def _knot(self, kind: int, knot: int) -> float:
        shift, slope, most = PRIORS[kind]
        prior = min(1 / (1 + math.exp(-(shift + slope * (LOW + knot)))), most)
        seen, good = float(self._seen[kind, knot]), float(self._good[kind, knot])
        return (good + STRENGTH * prior) / (seen + STRENGTH)


def _place(joint: float) -> tuple[int, float]:
    """The knot below the log-odds, and how far it lies towards the next one."""
    joint = min(max(joint, 1e-9), 1 - 1e-6)
    at = min(max(math.log(joint / (1 - joint)) - LOW, 0.0), KNOTS - 1.001)
    return int(at), at - int(at)


@dataclass
class Economy:
    """What an iteration pays. `rate`: tokens per second of the batch, 0 while it is not known.

    `verify` [n], seconds of the target's pass by tokens in all; `draft` [n], of a draft pass by its tokens;
    `chain`, of a step of all rows' chains, infinite if they cannot have any.
    """

    rate: float
    rows: int
    verify: Any
    draft: Any
    chain: float = math.inf

    def node(self, nodes: int) -> float:
        """Tokens that one node more costs, behind so many of each row."""
        at = min(self.rows * (nodes + 1), len(self.verify) - 1)
        return self.rate * float(self.verify[at] - self.verify[max(at - self.rows, 0)]) / self.rows

    def layer(self, nodes: int) -> float:
        """Tokens that a draft pass over so many nodes of each row costs a row."""
        tokens, last = self.rows * nodes, len(self.draft) - 1
        seconds = float(self.draft[min(tokens, last)])
        if tokens > last:  # goes on as it did over the table's second half
            seconds += (tokens - last) * float(self.draft[last] - self.draft[last // 2]) / (last - last // 2)
        return self.rate * seconds / self.rows

    def step(self) -> float:
        """Tokens that a chain's step costs a row."""
        return self.chain if math.isinf(self.chain) else self.rate * self.chain / self.rows


@dataclass
class Yield:
    """What layers gave for the chances of the one before."""

    ratio: float = _YIELD

    def learn(self, had: float, gave: float) -> None:
        if had > 0:
            self.ratio += _SLOW * (min(gave / had, 1.0) - self.ratio)


@dataclass
class GoodputGrowth(Growth):
    chances: Chances = field(default_factory=Chances)
    economy: Economy = field(default_factory=lambda: Economy(0.0, 1, [0.0], [0.0]))
    yields: Yield = field(default_factory=Yield)
    kind: int = 0
    layer: list[int] = field(default_factory=lambda: [-1])
    spent: float = 0.0  # tokens that the draft's passes cost

    def wants(self) -> list[int]:
        return self.layer

    def grow(self, found: Mapping[int, Followers]) -> None:
        self.spent += self.economy.layer(len(found))
        openings = [
            Opening(node, self.products[node] if node >= 0 else 1.0, each) for node, each in found.items()
        ]
        heap = [(-self._hoped(opening), at) for at, opening in enumerate(openings)]
        heapify(heap)
        new: list[int] = []
        while self.room > 0 and heap and -heap[0][0] > self._least(bool(new)):
            opening = openings[heap[0][1]]
            if (following := opening.take()) is not None:
                token, prob = following
                self.products.append(opening.worth * prob)
                new.append(self.add(token, opening.node, self.chances.read(opening.worth * prob, self.kind)))
            heapreplace(heap, (-self._hoped(opening), heap[0][1]))
        gave = sum(self.value[node] for node in new)
        if -1 not in found:
            self.yields.learn(sum(self.worth(node) for node in found), gave)
        self.layer = self._next(new)

    def _least(self, more: bool) -> float:
        """Tokens that a node must be worth; of a layer's likeliest its share of the budget is not asked."""
        price = self.economy.node(len(self.tokens))
        return max(price, 1 / self.most) if more else price

    def _hoped(self, opening: Opening) -> float:
        """Tokens that one more follower there is expected to add."""
        prob = opening.expected()
        return self.chances.read(opening.worth * prob, self.kind) if prob > NOTHING else 0.0

    def _next(self, new: list[int]) -> list[int]:
        """The nodes that the next pass is to read, if it pays: the likeliest first."""
        node = self.economy.node(len(self.tokens))
        able = [each for each in new if self.depths[each] < self.deepest]
        able.sort(key=lambda each: -self.value[each])
        able = [each for each in able[: self.room] if self.value[each] * self.yields.ratio > node]
        gain = sum(self.value[each] for each in able) * self.yields.ratio
        return able if able and gain > self.economy.layer(len(able)) + node else []

    def lead(self, longest: int) -> float:
        """Tokens by which the tree is expected to be ahead of a chain of at most so many tokens."""
        places = sum(map(self.economy.node, range(len(self.tokens))))
        return sum(self.value) - self.spent - places - self._chain(longest)

    def _chain(self, longest: int) -> float:
        """What the likeliest way would give as a chain, whose steps may be cheaper and go farther."""
        first: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            first.setdefault(parent, node)
        step, way, at = self.economy.step(), [1.0], -1
        while (at := first.get(at, -1)) >= 0:
            way.append(self.value[at])
        if self.room > 0 and len(way) > 1:  # what ended a full tree tells nothing of the draft
            ratio = min(way[-1] / way[-2], 1.0) if way[-2] > 0 else 0.0
            while len(way) <= longest and way[-1] * ratio > step:
                way.append(way[-1] * ratio)
        best = total = 0.0
        for k, chance in enumerate(way[1 : longest + 1]):
            total += chance - step - self.economy.node(k)
            best = max(best, total)
        return best
