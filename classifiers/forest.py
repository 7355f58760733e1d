"""A trace as look-ups for trees: what a tree that begins at a place of a text holds, and what of it stands.

The rules are the shipped ones; what they are told of each node comes from the trace: along the text from its
steps, off it from the bushes. Where a rule goes on from a node that no bush has, a law of another one stands
in for it, and the node is counted as `unknown`; beyond it nothing is accepted in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from classifiers.chains import heat_of
from classifiers.traces import Array, Trace, TraceError
from engine.speculation.tree import MOST_CHILDREN, Followers, Growth


@dataclass(frozen=True)
class Grown:
    """One tree. `kept`: the nodes that the target verifies; `way`: those that it accepts; `passes`: how many
    were read by each draft pass; `unknown`: of these, those of which the trace knows nothing."""

    kept: tuple[int, ...] = ()
    way: tuple[int, ...] = ()
    passes: tuple[int, ...] = ()
    unknown: int = 0

    @property
    def nodes(self) -> int:
        return len(self.kept)

    @property
    def accepted(self) -> int:
        return len(self.way)


@dataclass
class Forest:
    """Places are numbered: the N steps, then the L rows of bushes; -1 is a place that nothing is known of."""

    base: Array  # int64[P], the step of a prompt's position 0
    total: Array  # int64[P], tokens of its text
    heat: Array  # float32[P], the temperature of its text
    tokens: int  # the most that a text may have
    rank: list[int]  # by step: the text's own token, in the place's order
    last: list[bool]  # by step
    order: Array  # float32[N + L, 32]
    top: Array  # float32[N + L, 10]
    entropy: Array  # float32[N + L]
    below: dict[int, int]  # of bushes: by place * 32 + rank the place that follows

    @classmethod
    def of(cls, trace: Trace) -> Forest:
        """Raises TraceError where the trace was recorded without trees."""
        steps, bushes = trace.steps, trace.bushes
        if bushes is None or steps.order is None or steps.rank is None:
            raise TraceError("the trace was recorded without trees: collect it with --trees")
        begins, size = np.asarray(trace.begins, dtype=np.int64), len(steps.pos)
        last = np.zeros(size, dtype=bool)
        last[begins[1:][np.diff(begins) > 0] - 1] = True
        first = np.searchsorted(bushes.step, bushes.step)  # the first row of the same step
        above = np.where(bushes.parent < 0, bushes.step, size + first + bushes.parent).astype(np.int64)
        keys = above * MOST_CHILDREN + bushes.rank
        return cls(
            base=begins[:-1],
            total=np.diff(begins),
            heat=heat_of(trace),
            tokens=trace.manifest.tokens,
            rank=steps.rank.tolist(),
            last=last.tolist(),
            order=np.concatenate([steps.order, bushes.order]),
            top=np.concatenate([steps.top, bushes.top]),
            entropy=np.concatenate([steps.entropy, bushes.entropy]),
            below=dict(zip(keys.tolist(), range(size, size + len(keys)), strict=True)),
        )

    def on_the_way(self, place: int, rank: int) -> bool:
        """Whether the follower is the text's own token, at a place along it."""
        return 0 <= place < len(self.rank) and self.rank[place] == rank

    def follow(self, place: int, rank: int) -> int:
        """The place behind this follower, -1 if nothing is known of it."""
        if self.on_the_way(place, rank) and not self.last[place]:
            return place + 1
        return self.below.get(place * MOST_CHILDREN + rank, -1) if place >= 0 else -1

    def followers(self, place: int) -> Followers:
        """As the drafter gives them; a token is its place in the order."""
        probs = self.order[place].tolist()
        known = iter([(rank, prob) for rank, prob in enumerate(probs) if prob > 0])
        return Followers(known, entropy=float(self.entropy[place]), top=self.top[place].tolist())

    def stand_in(self, step: int, node: int) -> int:
        """Some place off the texts."""
        steps, size = len(self.rank), len(self.order)
        return steps + (7919 * step + 104729 * node) % (size - steps) if size > steps else 0

    def grow(self, growth: Growth, step: int) -> Grown:
        """Drafts a tree at a step, as `TreeDrafter` does, and walks down the text's own tokens."""
        where, passes, unknown = {-1: step}, [], 0
        while wanted := growth.wants():
            for node in wanted:
                if node >= 0:
                    where[node] = self.follow(where[growth.parents[node]], growth.tokens[node])
            lacking = [node for node in wanted if where[node] < 0]
            unknown += len(lacking)
            passes.append(len(wanted))
            known = {
                node: self.followers(where[node] if where[node] >= 0 else self.stand_in(step, node))
                for node in wanted
            }
            growth.grow(known)
        kept = growth.kept()
        return Grown(tuple(kept), tuple(self._way(growth, kept, step)), tuple(passes), unknown)

    def _way(self, growth: Growth, kept: Seq[int], step: int) -> Iterator[int]:
        children = {(growth.parents[node], growth.tokens[node]): node for node in kept}
        node = -1
        while (found := children.get((node, self.rank[step]))) is not None:
            node = found
            yield node
            if self.last[step]:
                return
            step += 1
