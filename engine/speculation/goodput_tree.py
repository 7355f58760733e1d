"""The goodput tree: a node is taken while it pays for its place in the target's pass, a layer while it pays
for a pass of the draft. Ours; the economics are those of `policies/goodput.py`.

With r the tokens per second that the batch emits, a node that stands with chance c is worth c tokens and
costs r times what one more token makes the target's pass longer; a layer costs r times a draft pass. So a
tree shrinks to a chain where siblings do not pay, and to nothing where its first layer does not.

A chance is read off the product of the draft's probabilities along the way, by a curve that is learned
from every node that was judged: it stood, or it did not. Of a follower that is still to be drawn only the
expected probability is known, and only that is asked: what is drawn stays.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from typing import Any

import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft
from engine.speculation.estimator import CLASSES, EDGES, KNOTS, LOW, MEMORY, PRIORS, STRENGTH
from engine.speculation.tree import NOTHING, Followers, Growth, Opening, Rule, TreeOptions, rule
from engine.speculation.tree_table import TreeTable

_YIELD = 0.7  # of a layer's chances, what the layer behind it adds, before anything was seen
_SLOW = 0.1  # weight of what was just seen
_LONGEST_REST = 32  # iterations without a tree before one is tried again


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

    `verify` [n], seconds of the target's pass by tokens in all; `draft` [n], of a draft pass by its tokens.
    """

    rate: float
    rows: int
    verify: Any
    draft: Any

    def node(self, nodes: int) -> float:
        """Tokens that one node more costs, behind so many of each row."""
        at = min(self.rows * (nodes + 1), len(self.verify) - 1)
        return self.rate * float(self.verify[at] - self.verify[max(at - self.rows, 0)]) / self.rows

    def layer(self, nodes: int) -> float:
        """Tokens that a draft pass over so many nodes of each row costs a row."""
        at = min(self.rows * nodes, len(self.draft) - 1)
        return self.rate * float(self.draft[at]) / self.rows


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
    layers: int = 0

    def wants(self) -> list[int]:
        return self.layer

    def grow(self, found: Mapping[int, Followers]) -> None:
        openings = [
            Opening(node, self.products[node] if node >= 0 else 1.0, each) for node, each in found.items()
        ]
        heap = [(-self._hoped(opening), at) for at, opening in enumerate(openings)]
        heapify(heap)
        new: list[int] = []
        while self.room > 0 and heap and -heap[0][0] > self.economy.node(len(self.tokens)):
            opening = openings[heap[0][1]]
            if (following := opening.take()) is not None:
                token, prob = following
                self.products.append(opening.worth * prob)
                new.append(self.add(token, opening.node, self.chances.read(opening.worth * prob, self.kind)))
            heapreplace(heap, (-self._hoped(opening), heap[0][1]))
        gave = sum(self.value[node] for node in new)
        if self.layers:
            self.yields.learn(sum(self.worth(node) for node in found), gave)
        self.layers += 1
        self.layer = self._next(new)

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

    def net(self) -> float:
        """Tokens that the tree is expected to add, less what it costs."""
        costs = self.layers * self.economy.layer(1) + sum(map(self.economy.node, range(len(self.tokens))))
        return sum(self.value) - costs


@rule("goodput_tree")
class GoodputTree(Rule):
    Options, draws, reads = TreeOptions, True, False

    def start(self, options: Any, most: int, deepest: int) -> GoodputGrowth:
        return GoodputGrowth(options, most, deepest)

    def table(self) -> TreeTable:
        return GoodputTable()


@dataclass
class _Row:
    """Of a row: what its trees have been expected to add, and how long it does without."""

    net: float = 1.0
    rest: int = 0  # iterations to go without a tree
    rests: int = 1  # how many it will be the next time


class GoodputTable(TreeTable):
    """Decides whether a row grows a tree at all, prepares those that do, and learns from all."""

    def __init__(self) -> None:
        super().__init__()
        self.chances = Chances()
        self._yields = [Yield() for _ in range(CLASSES)]
        self._rows: dict[str, _Row] = {}

    def give_back(self, seq: Sequence) -> None:
        super().give_back(seq)
        self._rows.pop(seq.id, None)

    def learns(self, seq: Sequence) -> bool:
        return True

    def limits(self, rows: Seq[Sequence]) -> list[int]:
        budgets = super().limits(rows)
        return [
            0 if self._rests(self._rows.setdefault(row.id, _Row())) else budget
            for row, budget in zip(rows, budgets, strict=True)
        ]

    def _rests(self, row: _Row) -> bool:
        if row.rest == 0 and row.net < 0:
            row.rest, row.rests = row.rests, min(2 * row.rests, _LONGEST_REST)
            row.net = 0.0  # the next tree decides anew
            return True
        if row.rest > 0:
            row.rest -= 1
        return row.rest > 0

    def begin(self, trees: Seq[tuple[Sequence, Growth]]) -> None:
        rows, verify = max(int(self.load.rows), 1), self.load.verify.numpy()
        plain = float(verify[min(rows, len(verify) - 1)])  # seconds without drafts: the rate is no less
        rate = max(float(self.load.rate), rows / plain if plain > 0 else 0.0)
        economy = Economy(rate, rows, verify, self.load.draft.numpy())
        for row, growth in trees:
            assert isinstance(growth, GoodputGrowth)
            kind = bisect_left(EDGES, row.params.temperature)
            growth.chances, growth.economy, growth.kind = self.chances, economy, kind
            growth.yields = self._yields[kind]

    def grown(self, trees: Seq[tuple[Sequence, Growth]]) -> None:
        for row, growth in trees:
            assert isinstance(growth, GoodputGrowth)
            known, net = self._rows.setdefault(row.id, _Row()), growth.net()
            known.net += (net - known.net) * (1.0 if known.net == 0 else 2 * _SLOW)
            if known.net > 0:
                known.rests = 1

    def judged(self, row: Sequence, draft: RowDraft, path: Seq[int]) -> None:
        stood = set(path)
        kind = bisect_left(EDGES, row.params.temperature)
        self.chances.learn(draft.joint, [k in stood for k in range(len(draft.joint))], kind)

    def shared(self) -> dict[str, dict[str, Tensor]]:
        return {"goodput_tree": self.chances.tensors}
