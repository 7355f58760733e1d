"""A fixed speculation lookahead."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.policy import Equipment, Need, State, StopPolicy, register


class StaticOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sl`: draft tokens per iteration; 0 drafts nothing."""

    sl: Annotated[
        int, msgspec.Meta(ge=0, le=64, description="draft tokens per iteration; 0 drafts nothing")
    ] = 5


@register("static")
class Static(StopPolicy):
    """Drafts `sl` tokens, always."""

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = StaticOptions
    needs: ClassVar[frozenset[Need]] = frozenset()

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        return State({"sl": torch.zeros(slots, dtype=torch.int64, device=device)})

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"sl": options.sl})

    def limit(self, state: State) -> Tensor:
        return state["sl"]
