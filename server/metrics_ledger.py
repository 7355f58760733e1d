"""Where every generated token went: into an answer, or why into none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter

from engine.types import StepStats, TokenEvent

Reason = Literal["stop_string", "best_of", "aborted", "error"]


@dataclass
class _Account:
    """One sequence. `reason`: why tokens that still come are in no answer, once its answer is settled."""

    life: int  # of the engine that runs it
    emitted: int = 0
    over: bool = False  # nothing more comes of it
    reason: Reason | None = None


class Ledger:
    """Generated tokens = tokens of answers + discarded ones, to the token.

    The engine may have begun a step when it is told to stop: a settled account stays open until the engine
    has let go of the sequence, and takes in what still comes.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._generated = Counter(
            "disco_generated_tokens_total", "Tokens that the engine emitted", registry=registry
        )
        self._discarded = Counter(
            "disco_discarded_tokens_total", "Tokens that are in no answer", ("reason",), registry=registry
        )
        for reason in ("stop_string", "best_of", "aborted", "error"):
            self._discarded.labels(reason)  # told as 0
        self._accounts: dict[str, _Account] = {}
        self._life = 0

    @property
    def open(self) -> int:
        """Sequences of which something may still come."""
        return len(self._accounts)

    def begin(self, sequence: str, life: int) -> None:
        """The engine is asked for the sequence of this id, which no other one had. `life`: see `on_step`."""
        self._accounts[sequence] = _Account(life)

    def on_step(self, stats: StepStats, events: Sequence[TokenEvent], life: int) -> None:
        """Takes one engine step in. `life`: times that the engine was started anew."""
        if life != self._life:
            self._life = life
            for sequence, account in list(self._accounts.items()):
                if account.life != life:
                    self.over(sequence)
        for event in events:
            count = len(event.token_ids)
            self._generated.inc(count)
            if event.id in self._accounts:
                account = self._accounts[event.id]
                account.emitted += count
                if account.reason is not None:
                    self._discarded.labels(account.reason).inc(count)
                if event.finish_reason is not None:
                    self.over(event.id)
        for sequence in stats.left:
            self.over(sequence)

    def over(self, sequence: str) -> None:
        """Nothing more comes of it."""
        account = self._accounts.get(sequence)
        if account is not None:
            account.over = True
            if account.reason is not None:
                del self._accounts[sequence]

    def settle(self, sequence: str, kept: int, reason: Reason) -> None:
        """Its answer has been given, with `kept` of its tokens; the others are discarded for this reason."""
        account = self._accounts.get(sequence)
        if account is None:
            return
        self._discarded.labels(reason).inc(account.emitted - kept)
        account.reason = reason
        if account.over:
            del self._accounts[sequence]

    def discard(self, count: int, reason: Reason) -> None:
        """So many tokens that counted are in no answer after all."""
        self._discarded.labels(reason).inc(count)
