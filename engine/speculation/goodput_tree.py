"""The goodput tree: a tree where that pays most, a chain where that does, nothing where nothing pays. Ours.

Each tree is grown by what its nodes and layers cost (`goodput_growth`). A chain is drafted by cheaper steps
than a tree's layers, so where chains are expected to give more than the trees that were grown lately, rows
get chains, stopped by the goodput policy, maybe before their first token. A tree is tried now and then.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable
from engine.speculation.drafters.base import RowDraft
from engine.speculation.estimator import CLASSES, EDGES
from engine.speculation.goodput_growth import Chances, Economy, GoodputGrowth, Yield
from engine.speculation.policies.goodput import GoodputOptions
from engine.speculation.tree import Depth, Growth, Rule, TreeOptions, rule
from engine.speculation.tree_table import TreeTable

_POOLING, _LATELY = 0.1, 0.5  # weight of the newest tree: in what all rows' gain, in what its row's do
_LONGEST_REST = 32  # iterations without a tree before one is tried again


class GoodputTreeOptions(TreeOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of trees and of chains."""

    max_depth: Annotated[Depth, msgspec.Meta(description="the most tokens on one way")] = 24


@rule("goodput_tree")
class GoodputTree(Rule):
    Options, draws, reads, chains = GoodputTreeOptions, True, False, "goodput"

    def start(self, options: Any, most: int, deepest: int) -> GoodputGrowth:
        return GoodputGrowth(options, most, deepest)

    def table(self) -> TreeTable:
        return GoodputTable()


@dataclass
class Rest:
    """Iterations without trees: how many are left, how many there will be the next time."""

    left: int = 0
    next: int = 1
    tried: bool = False  # a tree, since the last one

    def rests(self, pays: bool) -> bool:
        """Whether this iteration goes without, where trees have paid lately or not."""
        if self.left > 0:
            self.left -= 1
            return True
        if pays:
            self.next = 1
            return False
        self.tried = not self.tried
        if self.tried:
            return False
        self.left, self.next = self.next - 1, min(2 * self.next, _LONGEST_REST)
        return True


class GoodputTable(TreeTable):
    """Decides what rows draft, prepares those that grow trees, and learns from all.

    Alone, without a table that it has joined, it knows no chains: rows draft trees or nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chances = Chances()
        self._yields = [Yield() for _ in range(CLASSES)]
        self._pooled = [0.0] * CLASSES  # tokens by which trees are ahead of chains
        self._leads: dict[str, float] = {}  # by row
        self._rest = Rest()
        self._resting = False
        self._chains: PolicyTable | None = None

    def join(self, chains: PolicyTable) -> None:
        self._chains = chains

    @property
    def chained(self) -> bool:
        return self._resting and self._chains is not None

    def take(self, seq: Sequence) -> None:
        if self._chains is None:
            super().take(seq)
        else:
            self._chains.take(seq, GoodputOptions(max_sl=_longest(seq)))

    def give_back(self, seq: Sequence) -> None:
        self._leads.pop(seq.id, None)
        if self._chains is None:
            super().give_back(seq)
        else:
            self._chains.give_back(seq)

    def put_aside(self, seq: Sequence) -> None:
        if self._chains is None:
            super().put_aside(seq)
        else:
            self._chains.put_aside(seq)

    def learns(self, seq: Sequence) -> bool:
        return True

    def limits(self, rows: Seq[Sequence]) -> list[int]:
        """Nothing while trees rest: if there are chains, their table is asked next."""
        self._resting = self._rest.rests(sum(self._lead(row) for row in rows if row.max_sl) >= 0)
        return [0] * len(rows) if self._resting else super().limits(rows)

    def _lead(self, row: Sequence) -> float:
        return self._leads.get(row.id, self._pooled[_kind(row)])

    def begin(self, trees: Seq[tuple[Sequence, Growth]]) -> None:
        rows, verify = max(int(self.load.rows), 1), self.load.verify.numpy()
        plain = float(verify[min(rows, len(verify) - 1)])  # seconds without drafts: the rate is no less
        rate = max(float(self.load.rate), rows / plain if plain > 0 else 0.0)
        chain = math.inf if self._chains is None else self._chains.load.step(rows)
        economy = Economy(rate, rows, verify, self.load.draft.numpy(), chain)
        for row, growth in trees:
            assert isinstance(growth, GoodputGrowth)
            growth.chances, growth.economy, growth.kind = self.chances, economy, _kind(row)
            growth.yields = self._yields[growth.kind]

    def grown(self, trees: Seq[tuple[Sequence, Growth]]) -> None:
        for row, growth in trees:
            assert isinstance(growth, GoodputGrowth)
            lead, kind, known = growth.lead(_longest(row)), growth.kind, self._lead(row)
            self._leads[row.id] = known + _LATELY * (lead - known)
            self._pooled[kind] += _POOLING * (lead - self._pooled[kind])

    def judged(self, row: Sequence, draft: RowDraft, path: Seq[int]) -> None:
        if draft.joint:
            stood = set(path)
            self.chances.learn(draft.joint, [k in stood for k in range(len(draft.joint))], _kind(row))

    def shared(self) -> dict[str, dict[str, Tensor]]:
        return {"goodput_tree": self.chances.tensors}


def _longest(row: Sequence) -> int:
    """The most tokens of a chain, which is a tree of one way."""
    assert isinstance(row.options, TreeOptions)
    return min(row.max_sl, row.options.budget, row.options.max_depth)


def _kind(row: Sequence) -> int:
    return bisect_left(EDGES, row.params.temperature)
