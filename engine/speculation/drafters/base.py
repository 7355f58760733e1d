"""What a drafter is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from engine.models.runner import Branches
from engine.sequence import Sequence


@dataclass
class RowDraft:
    """Draft tokens for one row: a tree, often a chain. Nodes come depth first, siblings as they were drawn.

    `parents`: by token the node that it follows, an earlier one, or -1, the row's newest token; None for a
    chain, where token k follows token k - 1.
    `laws` float[V] per token is the law q that it was sampled from, but for what siblings before it have
    taken of it; kept only where the verifier needs it (rejection sampling with a sampled draft). Empty means
    q is one-hot, unless the draft loop has `kept` the logits: (buffer bfloat16[N, V], the first token's line
    of it, temperature), valid until the next draft.
    `read`: by node of a tree, the place among those that the draft's own KV holds; -1 if it does not.
    `joint`: by node, what the rule that grew the tree wants to be reminded of.
    """

    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    kept: tuple[Tensor, int, float] | None = None
    parents: list[int] | None = None
    read: list[int] = field(default_factory=list)
    joint: list[float] = field(default_factory=list)
    trimmed: int = 0  # tokens that were drafted and are no more: they could not have stood
    stop_reason: str | None = None  # policy, cap, room, drafter; None if nothing was to be drafted
    unsound: bool = False  # the draft's own logits were NaN

    @property
    def drafted(self) -> int:
        """Tokens that drafting gave."""
        return len(self.tokens) + self.trimmed

    @property
    def lookahead(self) -> int:
        """Of these the tokens on the longest way."""
        return self.drafted if self.parents is None else max(self.depths())

    def ends_with(self, path: Seq[int]) -> bool:
        """Whether nothing was drafted behind the nodes of a way."""
        last = path[-1] if path else -1
        return last == len(self.tokens) - 1 if self.parents is None else last not in self.parents

    def children(self) -> list[list[int]]:
        """For the row's newest token, then by node: the nodes that follow it, as they were drawn."""
        found: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for k in range(len(self.tokens)):
            found[k if self.parents is None else self.parents[k] + 1].append(k)
        return found

    def before(self) -> list[list[int]]:
        """The draft tokens that lead to where the target is asked: the row's end, then every node."""
        if self.parents is None:
            return [self.tokens[:k] for k in range(len(self.tokens) + 1)]
        found: list[list[int]] = [[]]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            found.append([*found[parent + 1], token])
        return found

    def depths(self) -> list[int]:
        """How many draft tokens lead to each of these places."""
        if self.parents is None:
            return list(range(len(self.tokens) + 1))
        found = [0]
        for parent in self.parents:
            found.append(found[parent + 1] + 1)
        return found

    def branches(self, start: int) -> Branches | None:
        """What the row's newest token, in slot `start`, and the nodes behind it attend; None for a chain."""
        if self.parents is None:
            return None
        seen = [0]
        for k, parent in enumerate(self.parents):
            seen.append(seen[parent + 1] | 1 << k)
        trunk, depths = start + 1, self.depths()
        return Branches(trunk, [start + depth for depth in depths], [trunk] * len(depths), seen)

    def law(self, k: int) -> Tensor | None:
        """float[V]: q of token k, without what its siblings took before it; None if it is one-hot."""
        if self.kept is not None:
            buffer, first, temperature = self.kept
            return (buffer[first + k].float() / temperature).softmax(-1)
        return self.laws[k] if self.laws else None


@dataclass
class Verdict:
    """By row: which draft tokens stand, and the token after them; `failed` rows have NaN logits."""

    path: list[Seq[int]]  # nodes, from the row's end on
    next_token: list[int]
    failed: list[bool]

    @classmethod
    def of(cls, rows: int) -> Verdict:
        """To be filled: nothing stands yet."""
        return cls([()] * rows, [0] * rows, [False] * rows)

    def fill(self, rows: Seq[int], of: Verdict) -> None:
        """Takes over what was found of these rows."""
        for i, path, token, failed in zip(rows, of.path, of.next_token, of.failed, strict=True):
            self.path[i], self.next_token[i], self.failed[i] = path, token, failed


def agreed(draft: RowDraft, chosen: Seq[int]) -> tuple[Seq[int], int]:
    """The nodes on the way of the target's choices, and the choice at its end.

    `chosen`: at the row's end, then at every node; -1 where there is no law, and the way ends before that.
    """
    path, at, children = [], 0, draft.children()
    while (step := next((k for k in children[at] if draft.tokens[k] == chosen[at]), None)) is not None:
        if chosen[step + 1] < 0:
            break
        path.append(step)
        at = step + 1
    return path, chosen[at]


@dataclass
class Drafted:
    """What came of a draft, by row, and what steps of it cost: (tokens read, seconds) each.

    `fault`: what ended it; the drafts hold what was sampled until then.
    """

    rows: list[RowDraft]
    steps: list[tuple[int, float]] = field(default_factory=list)
    fault: Exception | None = None


Drafts = Callable[[], Drafted]
"""Waits for the drafts."""


class Drafter(Protocol):
    """`table`: what governs the drafter's rows, a `PolicyTable`, or a `TreeTable`."""

    def room(self, seq: Sequence) -> int:
        """The most tokens that the drafter could propose for the row now: its context has an end."""
        ...

    def lags(self, seq: Sequence) -> bool:
        """Whether the drafter's own KV is so far behind that the row must be read before it drafts."""
        ...

    def read(self, rows: Seq[tuple[Sequence, int]], budget: int) -> None:
        """Fills the drafter's own KV with the first so many tokens of each row; `budget` tokens in all."""
        ...

    def warm(self, table: Any, policy: str, rows: int) -> None:
        """Readies what drafting for up to `rows` rows under the policy will need."""
        ...

    def begin(self, rows: Seq[Sequence], limits: Seq[int], table: Any) -> Drafts:
        """Starts one chain for each row, at most limits[i] >= 1 tokens, stopped early by the row's policy.

        What it returns waits for the chains; on a GPU the caller may do other things first. Every token
        that was sampled is in the result: dropping one would bias the output. A `stop_reason` is set
        where a policy or the drafter stopped before the limit.
        """
        ...
