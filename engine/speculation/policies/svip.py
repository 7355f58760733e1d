"""SVIP (arXiv 2411.18462): stop where the draft's own entropy says that acceptance is in doubt."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Signals, State, StopPolicy, register


class SvipOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`scale` c and `threshold` h of the rule sqrt(c H) > h; `max_sl`: the most to draft."""

    scale: Annotated[
        float, msgspec.Meta(ge=1e-6, le=10, description="c in sqrt(c H), H the draft's entropy in nats")
    ] = 0.15
    threshold: Annotated[
        float, msgspec.Meta(ge=0, le=10, description="stop when sqrt(c H) is greater than this")
    ] = 0.3
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration")] = 40


@register("svip")
class Svip(StopPolicy):
    """Stops when sqrt(c H) > h, H the entropy of the law that the token came from; that token is kept.

    sqrt(c H) bounds the chance of a rejection, as the paper approximates it from the draft alone. The
    law is the draft's at temperature 1, whatever the request's.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = SvipOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"entropy"})

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        most = torch.zeros(slots, dtype=torch.float32, device=device)
        return State({"most": most, "max_sl": torch.zeros(slots, dtype=torch.int64, device=device)})

    def reset(self, state: State, slot: int, options: Any) -> None:
        # As a bound on H: no root in every step, and none of an H that rounds below 0.
        most = options.threshold**2 / options.scale
        state.reset(slot, {"most": most, "max_sl": options.max_sl})

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert signals.entropy is not None
        return signals.entropy <= state["most"]
