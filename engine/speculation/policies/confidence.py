"""Stop when the draft is not confident: transformers' assistant confidence threshold, and two variants."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Need, Outcome, Signals, State, register

_SIGNALS = ("token", "top", "joint")


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


@register("confidence")
class Confidence:
    """Drafts on while the signal is at least the threshold; the token that fell below is kept."""

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = ConfidenceOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"prob", "largest", "joint"})
    learns: ClassVar[bool] = False

    def allocate(self, slots: int, device: torch.device) -> State:
        zeros = torch.zeros(slots, dtype=torch.int64, device=device)
        threshold = torch.zeros(slots, dtype=torch.float32, device=device)
        return State({"signal": zeros, "threshold": threshold, "max_sl": zeros.clone()})

    def reset(self, state: State, slot: int, options: Any) -> None:
        signal = _SIGNALS.index(options.signal)
        state.reset(slot, {"signal": signal, "threshold": options.threshold, "max_sl": options.max_sl})

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert signals.prob is not None and signals.largest is not None and signals.joint is not None
        candidates = torch.stack([signals.prob, signals.largest, signals.joint])  # [3, B]
        confidence = candidates.gather(0, state["signal"][None])[0]
        return confidence >= state["threshold"]

    def observe(self, outcome: Outcome, state: State) -> None:
        return None
