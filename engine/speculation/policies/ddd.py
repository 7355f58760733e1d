"""Dynamic Depth Decoding's check (arXiv 2409.00142), for a chain: is this draft still worth its depth?"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Signals, State, StopPolicy, register

_MOST = 64  # the last step that there can be
_STEP = msgspec.Meta(ge=1, le=_MOST)


class DddOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Checks after step `first` and every `every` steps up to `last`. ValueError if `last` < `first`."""

    threshold: Annotated[
        float,
        msgspec.Meta(
            ge=-100, le=0, description="stop at a check where the draft's log-probability is below this"
        ),
    ] = -0.3
    first: Annotated[int, _STEP, msgspec.Meta(description="the first step that is checked")] = 5
    every: Annotated[int, _STEP, msgspec.Meta(description="steps from check to check")] = 2
    last: Annotated[int, _STEP, msgspec.Meta(description="no step beyond this is checked")] = 9
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=_MOST, description="the most to draft in an iteration")] = 11

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"`last` ({self.last}) is before `first` ({self.first}): nothing is checked")


@register("ddd")
class Ddd(StopPolicy):
    """Stops at a check where the logsumexp of the beam's log-probabilities is below the threshold.

    A chain's beam is one: that is the log of the draft's joint probability. Between checks it
    drafts on whatever happens, so that a check costs little; here all cost the same, and the
    schedule is kept because it is the rule. The paper drafts trees; `max_sl` for a chain is ours.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = DddOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"joint"})

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        """`least` [slots, step]: the joint probability that this step asks for; -1 where none is checked."""
        least = torch.full((slots, _MOST + 1), -1.0, device=device)
        return State({"least": least, "max_sl": torch.zeros(slots, dtype=torch.int64, device=device)})

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"least": -1.0, "max_sl": options.max_sl})
        checked = slice(options.first, options.last + 1, options.every)
        state.tensors["least"][slot, checked] = math.exp(options.threshold)

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert signals.joint is not None
        step = signals.step.clamp(max=_MOST)[None]
        return signals.joint >= state.tensors["least"][state.rows, step]
