"""AdaEDL (arXiv 2410.18351): an entropy bound on acceptance, against a threshold that follows verdicts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, Outcome, Signals, State, StopPolicy, register

_TARGET = 0.9  # acceptance rate that the threshold steers to
_MEMORY = 0.5  # of the acceptance rate, an iteration
_STEP = 0.1 * 0.01  # of the threshold: lambda' is .01 away, and counts a tenth


class AdaEdlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`gamma` of the bound 1 - sqrt(gamma H); `threshold`: lambda at first; `max_sl`: the most to draft."""

    gamma: Annotated[
        float, msgspec.Meta(ge=1e-6, le=10, description="of 1 - sqrt(gamma H), H the draft's entropy in nats")
    ] = 0.2
    threshold: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="stop when the bound falls below; at first, then learned")
    ] = 0.5
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration")] = 20


@register("adaedl")
class AdaEdl(StopPolicy):
    """Stops when 1 - sqrt(gamma H) < lambda; the token that the law of entropy H gave is kept.

    After every iteration that drafted: AR <- .5 AR + .5 accepted/drafted, from 0. lambda' is
    lambda + .01 if AR < .9; otherwise lambda - .01, or lambda if all were accepted (then nothing
    says where to stop). lambda <- .9 lambda + .1 lambda', kept within [0, 1]. It moves by .001 at most, so
    that the first lambda matters; .5 is ours (a code model of 1.5B with a draft of 0.5B, greedy: about
    the best of .2 to .8 where a draft step costs .1 or .3 of a target's pass).
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = AdaEdlOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"entropy"})

    def learns(self, options: Any) -> bool:
        return True

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        """`own` [slots, 4]: gamma, lambda, AR, and the greatest entropy that lambda allows."""
        own = torch.zeros(slots, 4, dtype=torch.float32, device=device)
        return State({"own": own, "max_sl": torch.zeros(slots, dtype=torch.int64, device=device)})

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"own": 0.0, "max_sl": options.max_sl})
        most = (1 - options.threshold) ** 2 / options.gamma
        state.tensors["own"][slot] = torch.tensor([options.gamma, options.threshold, 0.0, most])

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        """1 - sqrt(gamma H) >= lambda, solved for H."""
        assert signals.entropy is not None
        return signals.entropy <= state.tensors["own"][:, 3][state.rows]

    def observe(self, outcome: Outcome, state: State) -> None:
        own, drafted = state["own"], outcome.drafted
        gamma, threshold, rate, _ = own.unbind(1)
        rate = torch.lerp(rate, outcome.accepted / drafted.clamp(min=1), 1 - _MEMORY)
        low = rate < _TARGET
        down = (outcome.accepted < drafted) & ~low
        threshold = (threshold + _STEP * (low.float() - down.float())).clamp(0, 1)
        news = torch.stack([gamma, threshold, rate, (1 - threshold) ** 2 / gamma], dim=1)
        state["own"] = torch.where((drafted > 0)[:, None], news, own)
