"""DySpec (arXiv 2410.11744): an opening is a node where one more follower may be taken, the likeliest first.

The chance of an opening is that the target gets to the node and takes none of those before. Where the next
follower is known, since nobody draws it, it is the follower's own chance: the paper draws always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Annotated, Any, Literal

import msgspec

from engine.speculation.tree import NOTHING, Followers, Growth, Opening, Rule, Share, TreeOptions, rule


class DySpecOptions(TreeOptions, frozen=True):
    """DySpec's."""

    growth: Annotated[
        Literal["layers", "greedy"],
        msgspec.Meta(
            description="layers: a draft pass for each layer, of what reaches the threshold; greedy: always "
            "the likeliest opening next, a draft pass for each node that gets children"
        ),
    ] = "layers"
    threshold: Annotated[
        Share | None,
        msgspec.Meta(
            description="the least chance of an opening in a layer; null: 1 / budget, "
            "half of it where nothing is drawn"
        ),
    ] = None


@dataclass
class _Openings(Growth):
    """A heap of openings by the chance that the target gets there."""

    heap: list[tuple[float, int, Opening]] = field(default_factory=list)  # (-chance, when it came, opening)
    came: int = 0

    def _open(self, node: int, followers: Followers) -> None:
        self._push(Opening(node, self.worth(node), followers))

    def _push(self, opening: Opening) -> None:
        chance = opening.worth * (opening.left if opening.drawn else opening.expected())
        if chance > NOTHING:
            self.came += 1
            heappush(self.heap, (-chance, self.came, opening))

    def _take(self) -> int | None:
        """One follower at the best opening; the node, or None if there is no more to take there."""
        opening = heappop(self.heap)[2]
        following = opening.take()
        if following is None:
            return None
        self._push(opening)
        token, prob = following
        return self.add(token, opening.node, opening.worth * prob)


@dataclass
class _Layers(_Openings):
    layer: list[int] = field(default_factory=lambda: [-1])

    def wants(self) -> list[int]:
        return self.layer if self.room > 0 else []

    def grow(self, found: Mapping[int, Followers]) -> None:
        self.heap = []
        for node, followers in found.items():
            self._open(node, followers)
        drawn = any(followers.squares is not None for followers in found.values())
        threshold = (1.0 if drawn else 0.5) / self.options.budget
        if self.options.threshold is not None:
            threshold = self.options.threshold
        layer = []
        while self.heap and self.room > 0 and -self.heap[0][0] >= threshold:
            new = self._take()
            if new is not None and self.value[new] >= threshold and self.depths[new] < self.deepest:
                layer.append(new)
        self.layer = layer


@dataclass
class _Greedy(_Openings):
    """Of a node that nobody has drafted on from only its own chance is known: it waits by that."""

    asked: list[int] = field(default_factory=lambda: [-1])
    waiting: list[tuple[float, int]] = field(default_factory=list)  # (-chance, node)

    def wants(self) -> list[int]:
        return self.asked

    def grow(self, found: Mapping[int, Followers]) -> None:
        for node, followers in found.items():
            self._open(node, followers)
        self.asked = []
        while self.room > 0 and (self.heap or self.waiting):
            if self.waiting and (not self.heap or self.waiting[0] < self.heap[0][:2]):
                self.asked = [heappop(self.waiting)[1]]
                return
            new = self._take()
            if new is not None and self.depths[new] < self.deepest:
                heappush(self.waiting, (-self.value[new], new))


@rule("dyspec")
class DySpec(Rule):
    Options, draws, reads = DySpecOptions, True, False

    def start(self, options: Any, most: int, deepest: int) -> Growth:
        kind = _Layers if options.growth == "layers" else _Greedy
        return kind(options, most, deepest)
