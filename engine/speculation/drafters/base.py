"""What a drafter is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.control import PolicyTable


@dataclass
class RowDraft:
    """A chain of draft tokens for one row: token k follows token k - 1, the first follows the row.

    `laws` float[V] per token is the law q that the token was sampled from, kept only where the
    verifier needs it (rejection sampling with a sampled draft). Empty means q is one-hot, unless the
    draft loop has `kept` the logits: (buffer bfloat16[N, V], the first token's line of it, temperature),
    valid until the next draft.
    """

    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    kept: tuple[Tensor, int, float] | None = None
    trimmed: int = 0  # tokens that were drafted and are no more: they could not have stood
    stop_reason: str | None = None  # policy, cap, room, drafter; None if nothing was to be drafted

    @property
    def drafted(self) -> int:
        """Tokens that drafting gave."""
        return len(self.tokens) + self.trimmed

    def law(self, k: int) -> Tensor | None:
        """float[V]: q of token k; None if it is one-hot."""
        if self.kept is not None:
            buffer, first, temperature = self.kept
            return (buffer[first + k].float() / temperature).softmax(-1)
        return self.laws[k] if self.laws else None


@dataclass
class Verdict:
    """By row: how many draft tokens stand, and the token after them; `failed` rows have NaN logits."""

    accepted: list[int]
    next_token: list[int]
    failed: list[bool]

    @classmethod
    def of(cls, rows: int) -> Verdict:
        """To be filled: nothing stands yet."""
        return cls([0] * rows, [0] * rows, [False] * rows)

    def fill(self, rows: Seq[int], of: Verdict) -> None:
        """Takes over what was found of these rows."""
        for i, accepted, token, failed in zip(rows, of.accepted, of.next_token, of.failed, strict=True):
            self.accepted[i], self.next_token[i], self.failed[i] = accepted, token, failed


def agreed(drafted: Seq[int], chosen: Seq[int]) -> int:
    """How many draft tokens, from the first on, are the target's choices."""
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
        accepted += 1
    return accepted


@dataclass
class Drafted:
    """What came of a draft: a chain for each row, and what steps of it cost, (rows, seconds) each."""

    rows: list[RowDraft]
    steps: list[tuple[int, float]] = field(default_factory=list)


Drafts = Callable[[], Drafted]
"""Waits for the drafts."""


class Drafter(Protocol):
    def room(self, seq: Sequence) -> int:
        """The most tokens that the drafter could propose for the row now: its context has an end."""
        ...

    def lags(self, seq: Sequence) -> bool:
        """Whether the drafter's own KV is so far behind that the row must be read before it drafts."""
        ...

    def read(self, rows: Seq[tuple[Sequence, int]], budget: int) -> None:
        """Fills the drafter's own KV with the first so many tokens of each row; `budget` tokens in all."""
        ...

    def warm(self, table: PolicyTable, policy: str, rows: int) -> None:
        """Readies what drafting for up to `rows` rows under the policy will need."""
        ...

    def begin(self, rows: Seq[Sequence], limits: Seq[int], table: PolicyTable) -> Drafts:
        """Starts one chain for each row, at most limits[i] >= 1 tokens, stopped early by the row's policy.

        What it returns waits for the chains; on a GPU the caller may do other things first. Every token
        that was sampled is in the result: dropping one would bias the output. A `stop_reason` is set
        where a policy or the drafter stopped before the limit.
        """
        ...
