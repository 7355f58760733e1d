"""DISCO (arXiv 2405.04304): a small classifier looks at every drafted token."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.heads import HeadState, missing_head
from engine.speculation.policy import Equipment, Need, Signals, State, StopPolicy, register
from engine.speculation.scoring import inputs_of, score


class DiscoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tau`: the least probability of acceptance; `max_sl`: the most to draft. 0: as the head was tuned."""

    tau: Annotated[
        float,
        msgspec.Meta(
            ge=0, le=1, description="stop when acceptance is less likely than this; 0: the head's own"
        ),
    ] = 0.0
    max_sl: Annotated[
        int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration; 0: the head's own")
    ] = 0


@register("disco")
class Disco(StopPolicy):
    """Drafts on while C = FFN(top-10 probabilities, entropy, position) is at least `tau`.

    As the paper has it; but C is calibrated, so that `tau` is a probability.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = DiscoOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"top", "entropy"})

    def missing(self, equipment: Equipment) -> str | None:
        return missing_head(equipment, "disco")

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        least = torch.zeros(slots, dtype=torch.float32, device=device)
        max_sl = torch.zeros(slots, dtype=torch.int64, device=device)
        return HeadState({"least": least, "max_sl": max_sl}, equipment.heads["disco"], device)

    def reset(self, state: State, slot: int, options: Any) -> None:
        assert isinstance(state, HeadState)
        own = state.head.options
        tau = torch.tensor(options.tau or own.threshold, dtype=torch.float64)
        # As log-odds, which is what the head gives: a sigmoid less in every draft step.
        state.reset(slot, {"least": float(tau.logit()), "max_sl": options.max_sl or own.max_sl})

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert isinstance(state, HeadState)
        if state.rows.is_cuda and len(state.weights["b1"]) <= 1024:  # what a program can hold
            return _launch(signals, state)
        return score(state.weights, inputs_of(signals, state.head.inputs)) >= state["least"]


def _launch(signals: Signals, state: HeadState) -> Tensor:
    from engine.models.kernels import disco

    assert signals.top is not None and signals.entropy is not None
    return disco.decide(
        signals.top, signals.entropy, signals.position, state.rows, state.tensors["least"], state.weights
    )
