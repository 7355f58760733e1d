"""DySpec (arXiv 2410.11744): a place is a node where one more follower may be drawn.

The likeliest come first; a place's chance is that of the target getting there: the node's own, less what
followers before have taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Annotated, Any, Literal

import msgspec

from engine.speculation.tree import Followers, Growth, Rule, Share, TreeOptions, rule

_NOTHING = 1e-6  # probability: what is left of a law after this is rounding


class DySpecOptions(TreeOptions, frozen=True):
    """DySpec's."""

    growth: Annotated[
        Literal["layers", "greedy"],
        msgspec.Meta(
            description="layers: a draft pass for each layer, of what reaches the threshold; greedy: always "
            "the likeliest place next, a draft pass for each node that gets children"
        ),
    ] = "layers"
    threshold: Annotated[
        Share | None, msgspec.Meta(description="the least chance of a place in a layer; null: 1 / budget")
    ] = None


@dataclass
class _Places(Growth):
    """A heap of places: nodes where one more may be taken, by the chance that the target gets there."""

    followers: dict[int, Followers] = field(default_factory=dict)
    left: dict[int, float] = field(default_factory=dict)  # by node: what of the law is not taken
    heap: list[tuple[float, int]] = field(default_factory=list)  # (-chance, node)

    def _open(self, node: int) -> None:
        heappush(self.heap, (-self.worth(node), node))

    def _take(self) -> int | None:
        """One follower at the best place; the node, or None if there is no more to take there."""
        chance, node = heappop(self.heap)
        following = next(self.followers[node].order, None)
        if following is None:
            return None
        token, prob = following
        left = self.left.get(node, 1.0)
        share = min(prob / left, 1.0)
        self.left[node] = left - prob
        if self.left[node] > _NOTHING:
            heappush(self.heap, (chance * (1 - share), node))
        return self.add(token, node, -chance * share)


@dataclass
class _Layers(_Places):
    layer: list[int] = field(default_factory=lambda: [-1])

    def wants(self) -> list[int]:
        return self.layer if self.room > 0 else []

    def grow(self, found: Mapping[int, Followers]) -> None:
        self.followers, self.heap = dict(found), []
        for node in found:
            self._open(node)
        threshold = 1 / self.options.budget if self.options.threshold is None else self.options.threshold
        layer = []
        while self.heap and self.room > 0 and -self.heap[0][0] >= threshold:
            new = self._take()
            if new is not None and self.value[new] >= threshold and self.depths[new] < self.deepest:
                layer.append(new)
        self.layer = layer


@dataclass
class _Greedy(_Places):
    def wants(self) -> list[int]:
        if not self.followers:
            return [-1]
        while self.heap and self.room > 0:
            node = self.heap[0][1]
            if node not in self.followers:
                return [node]
            new = self._take()
            if new is not None and self.depths[new] < self.deepest:
                self._open(new)
        return []

    def grow(self, found: Mapping[int, Followers]) -> None:
        if not self.followers:
            self._open(-1)
        self.followers.update(found)


@rule("dyspec")
class DySpec(Rule):
    Options, draws, reads = DySpecOptions, True, False

    def start(self, options: Any, most: int, deepest: int) -> Growth:
        kind = _Layers if options.growth == "layers" else _Greedy
        return kind(options, most, deepest)
