"""Token trees: how a drafter grows one, node by node, from what the draft says may follow each node.

A rule sees a node's followers in the order in which they are to be taken: drawn without replacement
where the target will judge by rejection, the likeliest first where its own choice decides. It decides
whether to take one more before it sees it; what was taken stays: a node that was drawn and then
dropped, or siblings that were sorted, would bias the output (speculation.md, section 5.3).

DySpec: arXiv 2410.11744. OPT-Tree: arXiv 2406.17276.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec

from engine.speculation.policy import Equipment
from engine.speculation.tree_table import TreeTable
from engine.types import InvalidRequest

MOST_NODES = 64
"""A node's ancestors are told as one word of bits."""
MOST_CHILDREN = 32
_NOTHING = 1e-6  # probability: what is left of a law after this is rounding

Budget = Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Temperature = Annotated[float, msgspec.Meta(gt=0, le=10)]


@dataclass
class Followers:
    """What may follow a node. `order`: tokens and their probabilities under the draft's law."""

    order: Iterator[tuple[int, float]]
    squares: float | None = None  # the sum of all probabilities' squares if they are drawn; else None
    entropy: float = 0.0  # nats, over the whole vocabulary, at temperature 1, as `top`
    top: Seq[float] = ()  # the ten largest probabilities


class TreeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every tree has."""

    budget: Annotated[Budget, msgspec.Meta(description="the most nodes, which the target verifies")] = 32
    max_depth: Annotated[Depth, msgspec.Meta(description="the most tokens on one way: draft passes")] = 8
    draft_temperature: Annotated[
        Temperature | None,
        msgspec.Meta(
            description="of the law that the tree grows by; null: the request's own, and 0.6 where that is 0"
        ),
    ] = None


@dataclass
class Growth:
    """One row's tree while it grows. Nodes come in the order of drafting, a parent before its children; -1 is
    the row's newest token. `value`: the rule's estimate that a node will stand.
    """

    options: Any
    most: int  # nodes, at most
    deepest: int  # the most tokens on one way
    begin: int = 0  # tokens that the request has generated
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)  # of probabilities, if the rule learns by them

    @abstractmethod
    def wants(self) -> list[int]:
        """The nodes whose followers are to be drafted next, all in one pass; none: the tree is grown."""
        ...

    @abstractmethod
    def grow(self, found: Mapping[int, Followers]) -> None:
        """Takes followers of the nodes that were wanted."""
        ...

    def kept(self) -> list[int]:
        """The nodes that go to the target, ascending, with all their ancestors."""
        return list(range(len(self.tokens)))

    @property
    def room(self) -> int:
        return self.most - len(self.tokens)

    def depth(self, node: int) -> int:
        return self.depths[node] if node >= 0 else 0

    def worth(self, node: int) -> float:
        return self.value[node] if node >= 0 else 1.0

    def add(self, token: int, parent: int, value: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depth(parent) + 1)
        self.value.append(value)
        return len(self.tokens) - 1


class Rule(Protocol):
    """How a tree grows. Stateless; what it must remember of a row is in the `Growth`."""

    name: ClassVar[str]
    Options: ClassVar[type[TreeOptions]]
    draws: ClassVar[bool]  # whether followers are drawn from the draft's law where the target rejects
    reads: ClassVar[bool]  # whether it reads `entropy` and `top`

    def missing(self, equipment: Equipment) -> str | None:
        """Why an engine with this equipment has no such drafter, or None."""
        return None

    def equipped(self, equipment: Equipment) -> Rule:
        """The rule with what it takes of the equipment, where nothing is missing."""
        return self

    def table(self) -> TreeTable:
        """What governs the rows of an engine whose trees grow so."""
        return TreeTable()

    @abstractmethod
    def start(self, options: Any, most: int, deepest: int) -> Growth: ...


_RULES: dict[str, Rule] = {}
R = TypeVar("R", bound=type[Rule])


def rule(name: str) -> Callable[[R], R]:
    """Class decorator that makes a rule known as drafter `name`."""

    def add(cls: R) -> R:
        cls.name = name
        _RULES[name] = cls()
        return cls

    return add


def rules() -> dict[str, Rule]:
    """Every rule by name."""
    import engine.speculation.c2t
    import engine.speculation.goodput_tree  # noqa: F401  (registration happens on import)

    return dict(_RULES)


def tree_options(name: str, options: Mapping[str, Any] | None) -> TreeOptions:
    """Validated options of the tree drafter. Raises InvalidRequest naming what would be valid."""
    kind = rules()[name].Options
    valid = kind.__struct_fields__
    unknown = sorted(set(options or {}) - set(valid))
    if unknown:
        message = f"drafter {name!r} has no option {unknown[0][:64]!r}; valid: {', '.join(valid)}"
        raise InvalidRequest(message, "speculation.options", "unknown_option")
    try:
        return msgspec.convert(dict(options or {}), kind)
    except msgspec.ValidationError as error:
        message = f"options of drafter {name!r}: {error}"
        raise InvalidRequest(message, "speculation.options", "invalid_option") from error


def describe_trees() -> dict[str, Any]:
    """JSON schema of every rule's options, by name."""
    return {name: msgspec.json.schema(each.Options) for name, each in sorted(rules().items())}


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


class OptTreeOptions(TreeOptions, frozen=True):
    """OPT-Tree's."""

    width: Annotated[
        Budget | None,
        msgspec.Meta(description="nodes of a layer that are drafted on from; null: as many as the budget"),
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
