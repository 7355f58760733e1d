"""C2T (arXiv 2502.13652): a small classifier says which tokens a tree takes, and which it grows on from.

It judges a candidate by how sure the draft is there, by the whole way to it (the joint probability, which
counts most) and by how deep it lies: the chance that the target goes this way. Unlike the paper's, its
probability is calibrated, so that thresholds are chances; and it reads what DISCO reads, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.heads import Head, missing_head
from engine.speculation.policy import Equipment, Signals
from engine.speculation.scoring import inputs_of, score
from engine.speculation.tree import MOST_CHILDREN, Followers, Growth, Rule, Share, TreeOptions, rule

CPU = torch.device("cpu")


class C2TOptions(TreeOptions, frozen=True):
    """C2T's."""

    threshold: Annotated[
        Share | None,
        msgspec.Meta(description="the least chance of a node that is drafted on from; null: the head's own"),
    ] = None
    leaf: Annotated[Share, msgspec.Meta(description="the least chance of a node that is taken at all")] = 0.02
    width: Annotated[
        int, msgspec.Meta(ge=1, le=MOST_CHILDREN, description="followers of a node that are looked at")
    ] = 8


@dataclass(frozen=True)
class Candidates:
    """Followers of a layer of nodes, side by side. `prob`: under the law that the tree grows by."""

    token: list[int]
    parent: list[int]
    prob: list[float]
    joint: list[float]  # the product of `prob` along the way
    entropy: list[float]  # of the parent, at temperature 1
    top: list[Seq[float]]  # likewise

    @classmethod
    def of(cls, found: Mapping[int, Followers], joint: Mapping[int, float], width: int) -> Candidates:
        """The first `width` followers of every node."""
        made = cls([], [], [], [], [], [])
        for node, followers in found.items():
            for _, (token, prob) in zip(range(width), followers.order, strict=False):
                made.token.append(token)
                made.parent.append(node)
                made.prob.append(prob)
                made.joint.append(prob * joint[node])
                made.entropy.append(followers.entropy)
                made.top.append(followers.top)
        return made

    def signals(self, depth: int, position: int) -> Signals:
        """As stop policies get them: `depth` of these tokens, and their `position` in what is generated."""
        count = len(self.token)
        return Signals(
            step=torch.tensor(depth),
            token=torch.tensor(self.token),
            position=torch.full((count,), position),
            alive=torch.ones(count, dtype=torch.bool),
            prob=torch.tensor(self.prob),
            top=torch.tensor(self.top),
            entropy=torch.tensor(self.entropy),
            joint=torch.tensor(self.joint),
        )


@dataclass
class _C2T(Growth):
    """Candidates that pass are kept until the end: of a tree that nobody draws, the best may be chosen."""

    head: Head | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    joint: dict[int, float] = field(default_factory=lambda: {-1: 1.0})
    layer: list[int] = field(default_factory=lambda: [-1])
    drafted: int = 0  # nodes that have been read

    def wants(self) -> list[int]:
        return self.layer

    def grow(self, found: Mapping[int, Followers]) -> None:
        assert self.head is not None
        self.drafted += len([node for node in found if node >= 0])
        depth = 1 + self.depth(next(iter(found)))
        some = Candidates.of(found, self.joint, self.options.width)
        chances = self._chances(some, depth)
        least = self.options.threshold
        least = self.head.options.threshold if least is None else least
        leaf = min(self.options.leaf, least)
        ways = sorted((i for i, chance in enumerate(chances) if chance >= leaf), key=lambda i: -chances[i])
        new = []
        for i in ways[: self.most]:
            new.append(self.add(some.token[i], some.parent[i], chances[i]))
            self.joint[new[-1]] = some.joint[i]
        more = depth < min(self.deepest, self.head.options.max_sl)
        # What the draft reads of the tree must fit where the tree's KV is.
        likely = [node for node in new if self.value[node] >= least]
        self.layer = likely[: self.most - self.drafted] if more else []

    def _chances(self, some: Candidates, depth: int) -> list[float]:
        """Of each candidate: no child's is above its parent's."""
        assert self.head is not None
        if not some.token:
            return []
        seen = some.signals(depth, self.begin + depth - 1)
        with torch.inference_mode():
            found: list[float] = score(self.weights, inputs_of(seen, self.head.inputs)).sigmoid().tolist()
        return [min(chance, self.worth(node)) for chance, node in zip(found, some.parent, strict=True)]

    def kept(self) -> list[int]:
        best = sorted(range(len(self.tokens)), key=lambda node: (-self.value[node], node))[: self.most]
        return sorted(best)  # no node is worth more than its parent


@rule("c2t")
class C2T(Rule):
    name: ClassVar[str]
    Options, draws, reads = C2TOptions, False, True

    def __init__(self, head: Head | None = None) -> None:
        self._head = head
        self._weights = {} if head is None else head.folded(CPU)

    def missing(self, equipment: Equipment) -> str | None:
        return missing_head(equipment, "c2t")

    def equipped(self, equipment: Equipment) -> Rule:
        return C2T(equipment.heads["c2t"])

    def start(self, options: Any, most: int, deepest: int) -> Growth:
        if self._head is None:
            raise RuntimeError("c2t grows trees by a head, and has none")
        return _C2T(options, most, deepest, head=self._head, weights=self._weights)
