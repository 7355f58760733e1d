"""What a client is told of tokens: usage, and the speculation behind them. Sums over choices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.types import TokenEvent


@dataclass
class Speculated:
    """Sums over the decode passes of one or several choices. `emitted` counts tokens of these passes."""

    policy: str = "none"
    drafter: str = "none"
    iterations: int = 0
    drafted: int = 0
    lookahead: int = 0
    accepted: int = 0
    emitted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def add(self, event: TokenEvent, kept: int) -> None:
        """Adds an event of which the first `kept` tokens count; drafts count whole, they were made."""
        self.policy, self.drafter = event.policy, event.drafter
        self.iterations += event.iterations
        self.drafted += event.drafted
        self.lookahead += event.lookahead
        self.accepted += min(event.accepted, kept)
        self.emitted += kept if event.iterations else 0
        self.draft_seconds += event.draft_seconds
        self.verify_seconds += event.verify_seconds

    def body(self) -> dict[str, Any]:
        """The extra field `speculation`. A ratio with nothing to divide by is 0.0."""
        return {
            "policy": self.policy,
            "drafter": self.drafter,
            "iterations": self.iterations,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "mean_sl": _ratio(self.lookahead, self.iterations),
            "acceptance_rate": _ratio(self.accepted, self.drafted),
            "mean_emitted": _ratio(self.emitted, self.iterations),
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def total(parts: Iterable[Speculated]) -> Speculated:
    """The sum; the choices of one request share policy and drafter."""
    result = Speculated()
    for part in parts:
        result.policy, result.drafter = part.policy, part.drafter
        result.iterations += part.iterations
        result.drafted += part.drafted
        result.lookahead += part.lookahead
        result.accepted += part.accepted
        result.emitted += part.emitted
        result.draft_seconds += part.draft_seconds
        result.verify_seconds += part.verify_seconds
    return result


def usage(prompt: int, cached: int, completion: int, speculated: Speculated) -> dict[str, Any]:
    """OpenAI's usage, in tokens. Draft tokens that were not emitted are `rejected_prediction_tokens`."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": speculated.accepted,
            "rejected_prediction_tokens": speculated.drafted - speculated.accepted,
        },
    }
