"""An iteration under way, and what its rows tell their requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from engine.scheduler import PlanRow
from engine.speculation.drafters.base import Drafts, Verdict
from engine.types import TokenEvent

BAD_LOGITS = "the model gave NaN or infinite logits for this request"


@dataclass
class Flight:
    """An iteration under way. `drafts`: rows, and what waits for their chains; `logits`: the target's."""

    rows: list[PlanRow]
    begin: float  # seconds of the host's clock, as are the next two
    drafts: list[tuple[list[PlanRow], Drafts]]
    drafted: float = 0.0  # when the drafts were there and the target's pass was queued
    verified: float = 0.0
    passed: list[PlanRow] = field(default_factory=list)  # the rows of the target's pass
    logits: Tensor | None = None
    verdict: Callable[[], Verdict] | None = None  # waits for it, where it was begun with the pass
    taught: bool = False  # policies have been told of it


def event_of(row: PlanRow, flight: Flight) -> TokenEvent:
    """What a row that sampled or failed tells its request."""
    seq = row.seq
    if row.failed:
        return TokenEvent(id=seq.id, finish_reason="error", error=BAD_LOGITS)
    refused = row.finish == "error"
    return TokenEvent(
        id=seq.id,
        token_ids=tuple(row.new),
        logprobs=row.logprobs,
        prompt_logprobs=tuple(seq.prompt_logprobs) if row.first and seq.prompt_logprobs else None,
        finish_reason=row.finish,
        stop_token_id=row.stop_token,
        error=seq.constraint.failure if refused and seq.constraint is not None else None,
        refused=refused,
        policy="none" if seq.drafter == "none" else seq.policy,
        drafter=seq.drafter,
        iterations=int(not row.first),
        drafted=row.draft.drafted,
        accepted=min(row.accepted, len(row.new)),
        stop_reason=row.draft.stop_reason,
        draft_seconds=flight.drafted - flight.begin if row.draft.drafted else 0.0,
        verify_seconds=0.0 if row.first else flight.verified - flight.drafted,
        cached_tokens=seq.cached_tokens if row.first else 0,
    )
