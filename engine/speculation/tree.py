"""Token trees: how a drafter grows one, node by node, from what the draft says may follow each node.

A rule sees a node's followers in the order in which they are to be taken: drawn without replacement
where the target will judge by rejection, the likeliest first where its own choice decides. It decides
whether to take one more before it sees it; what was taken stays: a node that was drawn and then
dropped, or siblings that were sorted, would bias the output (speculation.md, section 5.3).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import msgspec

from engine.speculation.policy import Equipment, converted
from engine.speculation.tree_table import TreeTable

MOST_NODES = 64
"""A node's ancestors are told as one word of bits."""
MOST_CHILDREN = 32
NOTHING = 1e-6  # probability: what is left of a law after this is rounding

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


@dataclass
class Opening:
    """A node where one more follower may be taken. `worth`: what the way to it is worth, to its rule."""

    node: int
    worth: float
    followers: Followers
    left: float = 1.0  # of the law's mass, what is not taken
    _squares: float = 0.0  # of the probabilities that are not taken
    _head: tuple[int, float] | None = None  # the next one, where it is no secret

    def __post_init__(self) -> None:
        self._squares = self.followers.squares or 0.0
        if not self.drawn:
            self._head = next(self.followers.order, None)

    @property
    def drawn(self) -> bool:
        """Whether nobody may know the next follower before it is taken."""
        return self.followers.squares is not None

    def expected(self) -> float:
        """The probability of the next follower, 0 if there is none; the expected one where it is drawn."""
        if not self.drawn:
            return 0.0 if self._head is None else self._head[1]
        return max(self._squares, 0.0) / self.left if self.left > NOTHING else 0.0

    def take(self) -> tuple[int, float] | None:
        """Token and probability."""
        if not self.drawn:
            taken, self._head = self._head, next(self.followers.order, None)
            return taken
        found = next(self.followers.order, None)
        if found is None:  # more are not told of one node
            self.left = 0.0
            return None
        self.left -= found[1]
        self._squares -= found[1] ** 2
        return found


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
    chains: ClassVar[str] = "none"  # the policy that stops its rows' chains, if they get any

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
    from engine.speculation import c2t, dyspec, goodput_tree, opt_tree  # noqa: F401  (they register themselves)

    return dict(_RULES)


def tree_options(name: str, options: Mapping[str, Any] | None) -> TreeOptions:
    """Validated options of the tree drafter. Raises InvalidRequest naming what would be valid."""
    return converted(rules()[name].Options, f"drafter {name!r}", options)


def describe_trees() -> dict[str, Any]:
    """JSON schema of every rule's options, by name."""
    return {name: msgspec.json.schema(each.Options) for name, each in sorted(rules().items())}
