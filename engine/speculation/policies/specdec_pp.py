"""SpecDec++ (arXiv 2405.19715): stop when it is likely that some drafted token will be rejected."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.heads import HeadState, missing_head
from engine.speculation.policy import Equipment, Need, Signals, State, StopPolicy, register
from engine.speculation.scoring import score


class SpecDecPPOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`h`: the risk of a rejection that is still taken; bounds of the lookahead. 0: as the head was tuned."""

    h: Annotated[
        float,
        msgspec.Meta(
            ge=0, le=1, description="stop when a rejection is likelier than this; 0: the head's own"
        ),
    ] = 0.0
    min_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the least to draft; 0: the head's own")] = 0
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft; 0: the head's own")] = 0


@register("specdec_pp")
class SpecDecPP(StopPolicy):
    """Drafts on while 1 - prod(p_acc) is at most `h`; p_acc comes from the draft's hidden state.

    The paper's head judges Y_i by the state after feeding Y_i. The state at step t is the one that Y_t
    was chosen from, after feeding Y_(t-1): so the product covers Y_1..Y_(t-1), and at step 1 it is
    empty. A head that was taught to judge the token chosen from the state (`judges` "drafted") sees
    one token further, with what is known before it is fed.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = SpecDecPPOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden"})

    def missing(self, equipment: Equipment) -> str | None:
        return missing_head(equipment, "specdec_pp")

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        reals = torch.zeros(2, slots, dtype=torch.float32, device=device)
        whole = torch.zeros(2, slots, dtype=torch.int64, device=device)
        tensors = {
            "h": reals[0].clone(),
            "product": reals[1].clone(),
            "min_sl": whole[0].clone(),
            "max_sl": whole[1].clone(),
        }
        return HeadState(tensors, equipment.heads["specdec_pp"], device)

    def reset(self, state: State, slot: int, options: Any) -> None:
        assert isinstance(state, HeadState)
        own = state.head.options
        most = options.max_sl or own.max_sl
        values = {
            "h": options.h or own.threshold,
            "product": 1.0,
            "min_sl": min(options.min_sl or own.min_sl, most),
            "max_sl": most,
        }
        state.reset(slot, values)

    def limit(self, state: State) -> Tensor:
        return state["max_sl"]

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        assert isinstance(state, HeadState) and signals.hidden is not None
        likely = score(state.weights, signals.hidden.float()).sigmoid()
        first = signals.step == 1
        if state.head.judges == "fed":
            product = torch.where(first, 1.0, state["product"] * likely)
        else:
            product = torch.where(first, likely, state["product"] * likely)
        # A row that does not draft keeps what it has: its signals mean nothing.
        state["product"] = torch.where(signals.alive, product, state["product"])
        return (1 - product <= state["h"]) | (signals.step < state["min_sl"])
