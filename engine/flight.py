"""An iteration under way, and what its rows tell their requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from engine.scheduler import PlanRow
from engine.speculation.drafters.base import Drafts, Verdict
from engine.speculation.tree import rules
from engine.types import TokenEvent

BAD_LOGITS = "the model gave NaN or infinite logits for this request"
NO_MEMORY = "there was not enough memory for this request's next tokens, even alone"


@dataclass
class Asked:
    """Seconds of the host with policies: while planning, drafting, and in the target's pass and after it."""

    planning: float = 0.0
    drafting: float = 0.0
    verifying: float = 0.0


@dataclass
class Flight:
    """An iteration under way. `drafts`: who drafts, for whom, what waits for it; `logits`: the target's."""

    rows: list[PlanRow]
    begin: float  # seconds of the host's clock, as are the next three
    planned: float  # when the rows were chosen
    drafts: list[tuple[str, list[PlanRow], Drafts]] = field(default_factory=list)
    drafted: float = 0.0  # when the drafts were there and the target's pass was queued
    verified: float = 0.0
    asked: Asked = field(default_factory=Asked)
    at: float = 0.0  # when it was verified, by `time.monotonic`
    plain_seconds: float = 0.0  # of a row, for a token without a draft
    other_seconds: float = 0.0  # of a row, for what else ran in the target's pass: prompts
    passed: list[PlanRow] = field(default_factory=list)  # the rows of the target's pass
    logits: Tensor | None = None
    verdict: Callable[[], Verdict] | None = None  # waits for it, where it was begun with the pass
    taught: bool = False  # policies have been told of it
    read: list[int] = field(default_factory=list)  # by row: what the draft had read of it when it began
    error: Exception | None = None  # what ended its begin
    rescued: bool = False  # it runs again, in parts

    @property
    def draft_seconds(self) -> float:
        return self.drafted - self.planned - self.asked.drafting

    @property
    def verify_seconds(self) -> float:
        return self.verified - self.drafted - self.asked.verifying

    @property
    def decide_seconds(self) -> float:
        return self.asked.planning + self.asked.drafting + self.asked.verifying


def event_of(row: PlanRow, flight: Flight) -> TokenEvent:
    """What a row that sampled or failed tells its request."""
    seq = row.seq
    refused = row.finish == "error"
    iterations = int(seq.started and not row.first)
    error = seq.constraint.failure if refused and seq.constraint is not None else None
    return TokenEvent(
        id=seq.id,
        token_ids=tuple(row.new),
        logprobs=row.logprobs,
        prompt_logprobs=tuple(seq.prompt_logprobs) if row.first and seq.prompt_logprobs else None,
        finish_reason="error" if row.failed else row.finish,
        stop_token_id=row.stop_token,
        error=(row.lost or BAD_LOGITS) if row.failed else error,
        refused=refused,
        policy="none" if seq.drafter in ("none", *rules()) else seq.policy,
        drafter=seq.drafter,
        iterations=iterations,
        drafted=row.draft.drafted,
        lookahead=row.draft.lookahead,
        accepted=min(row.accepted, len(row.new)),
        bonus=bool(row.draft.tokens) and row.draft.ends_with(row.path),
        stop_reason=row.draft.stop_reason,
        draft_seconds=flight.draft_seconds if row.draft.drafted else 0.0,
        verify_seconds=flight.verify_seconds if iterations else 0.0,
        cached_tokens=seq.cached_tokens if row.first else 0,
        scheduled=seq.scheduled if row.first else None,
        at=flight.at,
        baseline_seconds=iterations * (len(row.new) * flight.plain_seconds + flight.other_seconds),
    )
