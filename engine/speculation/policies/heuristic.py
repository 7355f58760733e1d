"""transformers' "heuristic" schedule: DISCO's "dynamic heuristic" baseline (arXiv 2405.04304)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Outcome, State, StopPolicy, register

_SL = msgspec.Meta(ge=1, le=64)


class HeuristicOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`start`: the first lookahead; `max_sl`: it never grows beyond."""

    start: Annotated[int, _SL, msgspec.Meta(description="the first lookahead")] = 5
    max_sl: Annotated[int, _SL, msgspec.Meta(description="the lookahead never grows beyond")] = 16


@register("heuristic")
class Heuristic(StopPolicy):
    """SL grows by 2 after an iteration whose drafts were all accepted, else shrinks by 1, at least 1."""

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = HeuristicOptions
    needs: ClassVar[frozenset[Need]] = frozenset()

    def learns(self, options: Any) -> bool:
        return True

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        zeros = torch.zeros(slots, dtype=torch.int64, device=device)
        return State({"sl": zeros, "max_sl": zeros.clone()})

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"sl": min(options.start, options.max_sl), "max_sl": options.max_sl})

    def limit(self, state: State) -> Tensor:
        return state["sl"]

    def observe(self, outcome: Outcome, state: State) -> None:
        sl = state["sl"]
        grown = torch.minimum(sl + 2, state["max_sl"])
        learned = torch.where(outcome.accepted == outcome.drafted, grown, (sl - 1).clamp(min=1))
        state["sl"] = torch.where(outcome.drafted > 0, learned, sl)
