"""OPT-Tree (arXiv 2406.17276): layer by layer the likeliest ways; of all of them the best tree is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from engine.speculation.tree import MOST_NODES, Budget, Followers, Growth, Rule, TreeOptions, rule


class OptTreeOptions(TreeOptions, frozen=True):
    """OPT-Tree's."""

    width: Annotated[
        Budget | None,
        msgspec.Meta(description="nodes of a layer to draft on from; null: budget / max_depth, at least 2"),
    ] = None
    delta: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=MOST_NODES,
            description="end when a layer adds less to the tokens expected to be accepted",
        ),
    ] = 0.1


@dataclass
class _OptTree(Growth):
    layer: list[int] = field(default_factory=lambda: [-1])
    expected: float = 0.0  # tokens, of the best tree so far
    drafted: int = 0  # nodes that have been read

    def wants(self) -> list[int]:
        return self.layer

    def grow(self, found: Mapping[int, Followers]) -> None:
        """Every candidate is kept until the end: of a tree that nobody draws, the best part may be chosen."""
        width = min(self.options.width or max(2, self.most // self.options.max_depth), self.most)
        ways = [
            (self.worth(node) * prob, token, node)
            for node, followers in found.items()
            for _, (token, prob) in zip(range(self.most), followers.order, strict=False)
        ]
        ways.sort(key=lambda way: -way[0])
        new = [self.add(token, node, value) for value, token, node in ways[: self.most]]
        best = sum(sorted(self.value, reverse=True)[: self.most])
        gained, self.expected = best - self.expected, best
        self.drafted += len([node for node in found if node >= 0])
        more = gained >= self.options.delta and bool(new) and self.depths[new[0]] < self.deepest
        # What the draft reads of the tree must fit where the tree's KV is.
        self.layer = new[: min(width, self.most - self.drafted)] if more else []

    def kept(self) -> list[int]:
        best = sorted(range(len(self.tokens)), key=lambda node: (-self.value[node], node))[: self.most]
        return sorted(best)  # no node is worth more than its parent


@rule("opt_tree")
class OptTree(Rule):
    Options, draws, reads = OptTreeOptions, False, False

    def start(self, options: Any, most: int, deepest: int) -> Growth:
        return _OptTree(options, most, deepest)
