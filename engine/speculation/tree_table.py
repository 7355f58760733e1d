"""What governs tree drafters: how many nodes each row's tree may have. What a `PolicyTable` is to chains."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.speculation.drafters.base import RowDraft
from engine.speculation.load import Load
from engine.speculation.stopwatch import Stopwatch

if TYPE_CHECKING:
    from engine.speculation.control import PolicyTable


class TreeTable:
    """Trees end by their own rule: `limits` are their budgets, and there is nothing to teach."""

    def __init__(self) -> None:
        self.load = Load(torch.device("cpu"))
        self.asked_while_drafting = Stopwatch()

    @property
    def chained(self) -> bool:
        """Whether rows are to get chains of the draft model now; their table says then how long."""
        return False

    def join(self, chains: PolicyTable) -> None:
        """This governs the draft model's chains, if rows are to get any."""
        return None

    def take(self, seq: Sequence) -> None:
        seq.slot = 0

    def give_back(self, seq: Sequence) -> None:
        seq.slot = -1

    def put_aside(self, seq: Sequence) -> None:
        seq.slot = -1

    def limits(self, rows: Seq[Sequence]) -> list[int]:
        return [self._budget(row.options) for row in rows]

    def _budget(self, options: Any) -> int:
        budget: int = options.budget
        return budget

    def begin(self, trees: Seq[tuple[Sequence, Any]]) -> None:
        """Rows' trees are about to grow: each with its `tree.Growth`."""
        return None

    def grown(self, trees: Seq[tuple[Sequence, Any]]) -> None:
        """They have."""
        return None

    def judged(self, row: Sequence, draft: RowDraft, path: Seq[int]) -> None:
        """The target has gone this way through the row's draft."""
        return None

    def check(self, policy: str, options: object) -> None:
        return None

    def warm(self, policy: str, rows: int) -> None:
        return None

    def learns(self, seq: Sequence) -> bool:
        return False

    def heal(self) -> list[str]:
        return []

    def shared(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def observe(self, rows: Seq[Sequence], drafted: Seq[int], accepted: Seq[int]) -> None:
        return None

    def observe_ahead(self, rows: Seq[Sequence], drafted: Seq[int], verdicts: Tensor) -> bool:
        return True
