"""A policy made to expose reused noise: lossless with honest draws, biased if positions share them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from lossless.toys import Pair
from torch import Tensor

from engine.speculation import policy as registry
from engine.speculation.policy import Equipment, Need, Outcome, Signals, State

# Two draft tokens of three fall, and half of the drafted ones are token 0.
PEEK_PAIR = Pair(
    3,
    lambda context: [math.log(p) for p in (0.3, 0.69, 0.01)],
    lambda context: [math.log(q) for q in (0.5, 0.05, 0.45)],
)


class PeekOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """It has none."""


class Peek:
    """Drafts two tokens. If the first fell, the second stood at the very position that comes next:
    the policy drafts there again unless it was token 0."""

    name: ClassVar[str] = "peek"
    Options: ClassVar[type[msgspec.Struct]] = PeekOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"prob"})
    shares: ClassVar[bool] = False

    def missing(self, equipment: Equipment) -> str | None:
        return None

    def learns(self, options: Any) -> bool:
        return True

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        no = torch.zeros(slots, dtype=torch.bool, device=device)
        return State({"was_zero": no, "pause": no.clone()})

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"was_zero": False, "pause": False})

    def limit(self, state: State) -> Tensor:
        pause = state["pause"]
        state["pause"] = torch.zeros_like(pause)
        return torch.where(pause, 0, 2)

    def keep_drafting(self, signals: Signals, state: State) -> Tensor:
        state["was_zero"] = (signals.token == 0) & (signals.step == 2)
        return torch.ones_like(signals.alive)

    def observe(self, outcome: Outcome, state: State) -> None:
        state["pause"] = state["was_zero"] & (outcome.accepted == 0)


@contextmanager
def registered() -> Iterator[None]:
    """The policy "peek" is known while this lasts."""
    registry.policies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "peek", Peek())
        yield
