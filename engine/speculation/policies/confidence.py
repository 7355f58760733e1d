"""Stop when the draft is not confident: transformers' assistant confidence threshold, and two variants."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Outcome, Signals, State, StopPolicy, register

_SIGNALS = ("token", "top", "joint")
_MOST = 64  # tokens of a draft
_PAIRS = 128  # (confidence, verdict) pairs that a request remembers
_ENOUGH = 6  # pairs, before the threshold moves
_MISSED = 3  # what stopping before a token that would stand weighs; drafting one that falls weighs 1


class ConfidenceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`signal`: the probability compared with `threshold`. `max_sl`: the most to draft."""

    signal: Annotated[
        Literal["token", "top", "joint"],
        msgspec.Meta(
            description="the drafted token's probability, the largest one, or the product along the draft"
        ),
    ] = "token"
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1, description="stop when the signal falls below")] = (
        0.4
    )
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration")] = 20
    online: Annotated[
        bool,
        msgspec.Meta(description="move the threshold to where the request's own verdicts say it is best"),
    ] = False


@register("confidence")
class Confidence(StopPolicy):
    """Drafts on while the signal is at least the threshold; the token that fell below is kept.

    With `online` the threshold follows verdicts as in transformers: of the ROC curve over pairs of
    (confidence, accepted) it takes the point of least FPR + 3 FNR, the greater threshold on a tie.
    Unlike there, a request remembers its last 128 pairs and no more. A token counts if all before
    it were accepted: the first rejection is the last pair of its draft, what follows has no verdict.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = ConfidenceOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"prob", "largest", "joint"})

    def learns(self, options: Any) -> bool:
        return bool(options.online)

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        """`drafted` [slots, step]: the confidence in each token of this draft. `pairs`, `stood`
        [slots, 128]: confidences and verdicts, newest first, -1 where there is none yet.
        """
        zeros = torch.zeros(slots, dtype=torch.int64, device=device)
        threshold = torch.zeros(slots, dtype=torch.float32, device=device)
        return State(
            {
                "signal": zeros,
                "threshold": threshold,
                "max_sl": zeros.clone(),
                "online": zeros.bool(),
                "drafted": threshold.new_zeros(slots, _MOST + 1),
                "pairs": threshold.new_full((slots, _PAIRS), -1.0),
                "stood": zeros.bool().new_zeros(slots, _PAIRS),
            }
        )

    def reset(self, state: State, slot: int, options: Any) -> None:
        signal = _SIGNALS.index(options.signal)
        own = {"signal": signal, "threshold": options.threshold, "max_sl": options.max_sl}
        empty = {"drafted": 0.0, "pairs": -1.0, "stood": False}
        state.reset(slot, {**own, **empty, "online": options.online})

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert signals.prob is not None and signals.largest is not None and signals.joint is not None
        candidates = torch.stack([signals.prob, signals.largest, signals.joint])  # [3, B]
        confidence = candidates.gather(0, state["signal"][None])[0]
        # Rows that have stopped write beyond their draft, where nobody reads.
        step = signals.step.clamp(max=_MOST)[None]
        state.tensors["drafted"][state.rows, step] = confidence
        return confidence >= state["threshold"]

    def observe(self, outcome: Outcome, state: State) -> None:
        news = torch.minimum(outcome.accepted + 1, outcome.drafted)  # tokens with a verdict
        pairs, stood = _remember(state, news, outcome.accepted)
        state["pairs"], state["stood"] = pairs, stood
        best, known = best_threshold(pairs, stood)
        moves = state["online"] & known & (news > 0)
        state["threshold"] = torch.where(moves, best, state["threshold"])


def _remember(state: State, news: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' pairs, float32 and bool[B, 128], with the draft's `news` [B] first tokens put before them."""
    at = torch.arange(_PAIRS, device=news.device)[None]
    news = news[:, None]
    # Newest first: the draft's tokens from its last with a verdict down to number 1, then what was known.
    source = torch.where(at < news, news - at, _MOST + 1 + at - news)
    drafted, known = state["drafted"], state["stood"]
    steps = torch.arange(_MOST + 1, device=news.device)[None]
    pairs = torch.cat([drafted, state["pairs"]], dim=1).gather(1, source)
    return pairs, torch.cat([steps <= accepted[:, None], known], dim=1).gather(1, source)


def best_threshold(pairs: Tensor, stood: Tensor) -> tuple[Tensor, Tensor]:
    """float32[B], bool[B]: the threshold of least FPR + 3 FNR over [B, N] pairs, and whether there is one.

    There is none before 6 pairs, and while all of them stood or all fell. Pairs below 0 (or NaN) are
    empty. In whole numbers (both rates times positives times negatives), so that ties are ties.
    """
    ordered, order = pairs.sort(dim=1, descending=True)
    there, stood = ordered >= 0, stood.gather(1, order)
    true = (there & stood).cumsum(1)  # tokens that stood, among those at or above this confidence
    false = (there & ~stood).cumsum(1)
    positives, negatives = true[:, -1:], false[:, -1:]
    loss = false * positives + _MISSED * (positives - true) * negatives
    ends = torch.ones_like(there)  # a threshold cannot part equal confidences
    ends[:, :-1] = ordered[:, :-1] != ordered[:, 1:]
    loss = torch.where(there & ends, loss, torch.iinfo(loss.dtype).max)
    best = ordered.gather(1, loss.argmin(1, keepdim=True))[:, 0]
    known = (positives > 0) & (negatives > 0) & (positives + negatives >= _ENOUGH)
    return best, known[:, 0]
