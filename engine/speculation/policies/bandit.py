"""A bandit over SL by batch size: BanditSpec's UCB (arXiv 2505.15141), Nightjar's SL = 0 and switching."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from engine.speculation.load import ROWS, TOKENS, Load
from engine.speculation.policy import Equipment, Need, Outcome, State, StopPolicy, register

ARMS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
BINS = (1, 2, 4, 8, 16, 32, ROWS)  # the most rows of each
_FADE = 0.999  # of what is known, a decision: the last thousand count
_HOPE = 1e-3  # pulls that an arm has had in advance, with every token accepted
_SUMS = 5  # kept by bin and arm: pulls; tokens emitted, their squares and tokens drafted in them; decisions


class BanditOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`exploration` weighs the confidence bound, `switching` is in draft steps, `max_sl` bounds the arms."""

    exploration: Annotated[
        float,
        msgspec.Meta(ge=0, le=10, description="weight of what is not known of an arm; 0 explores nothing"),
    ] = 0.2
    switching: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=64,
            description="draft steps of time that drafting is charged with after none was drafted",
        ),
    ] = 0.5
    max_sl: Annotated[int, msgspec.Meta(ge=0, le=64, description="the most to draft in an iteration")] = 24


@register("bandit")
class Bandit(StopPolicy):
    """Takes the SL of the greatest upper confidence bound on tokens per second, at this batch size.

    An arm is an SL, 0 among them; bins of batch size (1, 2, 3-4, ... 33-64 decoding rows) learn apart,
    shared by all requests. With n pulls of an arm in N decisions of the bin, both fading by .999 a
    decision, E and V mean and variance of the tokens emitted, D the mean of those drafted:

        index = (E + exploration (sqrt(V log(1+N) / n) + SL log(1+N) / n)) / (T(D) + switching t_draft)

    UCB-V's bound (Audibert et al., 2009) on a mean in [1, 1 + SL], with each arm's own n; `switching` only
    if the row's last SL was 0 and this one is not: the draft's KV must then catch up, which also keeps
    it from flapping. T, the time of an iteration in which all rows draft D, is not learned but looked
    up in the engine's costs, so that the index holds when they change; D is less than SL where room,
    a cap or the drafter ended the draft. A pull of an arm shows what every shorter one would have
    given, min(accepted, SL) + 1, whatever was accepted, so it is a pull of those as well. SL = 0 thus
    is known without being tried, and under it n fades while N stays: that is when drafting is tried
    again. Where no cost is known it learns, and drafts as many as it may.
    """

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = BanditOptions
    needs: ClassVar[frozenset[Need]] = frozenset()
    shares: ClassVar[bool] = True  # learns over all requests

    def learns(self, options: Any) -> bool:
        return True

    def allocate(self, slots: int, device: torch.device, equipment: Equipment) -> State:
        return _BanditState(slots, device, equipment.load)

    def reset(self, state: State, slot: int, options: Any) -> None:
        state.reset(slot, {"last": -1, "bin": 0, "max_sl": options.max_sl, "weights": options.exploration})
        state.tensors["weights"][slot, 1] = options.switching

    def limit(self, state: State) -> Tensor:
        assert isinstance(state, _BanditState)
        at = torch.bucketize(state.load.rows, state.edges)[None]  # int64[1], the present bin
        known = torch.add(state.decision, state.shared["known"][at], alpha=_FADE)
        state.shared["known"].index_copy_(0, at, known)
        best = _index(state, known[0]).argmax(1)  # the shortest on a tie
        state["bin"], state["last"] = at.expand_as(best), best
        return state.arms[best]

    def observe(self, outcome: Outcome, state: State) -> None:
        """Told of every row of the batch; what is shared is of its own alone."""
        assert isinstance(state, _BanditState)
        drafted, accepted = outcome.drafted[:, None], outcome.accepted[:, None]
        pulled = (state.arms <= state.arms[state["last"]][:, None]) & (drafted > 0)
        if state.mine is not None:
            pulled = pulled & state.mine[:, None]
        emitted = torch.minimum(accepted, state.arms) + 1
        one, none = torch.ones_like(emitted), torch.zeros_like(emitted)
        news = torch.stack([one, emitted, emitted**2, torch.minimum(drafted, state.arms), none], dim=1)
        state.shared["known"].index_add_(0, state["bin"], (news * pulled[:, None]).float())


class _BanditState(State):
    """`last`: the arm of the row's last decision, -1 before any; `bin`: that decision's; `weights`:
    exploration and switching. Shared: `known` [bins, 5, arms], fading sums (see `_SUMS`).
    """

    def __init__(self, slots: int, device: torch.device, load: Load) -> None:
        zeros = torch.zeros(slots, dtype=torch.int64, device=device)
        weights = torch.zeros(slots, 2, dtype=torch.float32, device=device)
        known = torch.zeros(len(BINS), _SUMS, len(ARMS), dtype=torch.float32, device=device)
        own = {"last": zeros, "bin": zeros.clone(), "max_sl": zeros.clone(), "weights": weights}
        super().__init__(own, load, {"known": known})
        self.arms = torch.tensor(ARMS, device=device)
        self.edges = torch.tensor(BINS[:-1], dtype=torch.float32, device=device)
        self.decision = torch.zeros(_SUMS, len(ARMS), device=device)
        self.decision[-1] = 1
        most = 1 + self.arms
        none = torch.zeros_like(most)
        self.hope = _HOPE * torch.stack([none + 1, most, most**2, self.arms, none])


def _index(state: _BanditState, known: Tensor) -> Tensor:
    """float32[B, arms]: the row's index of each arm, given `known` [5, arms]; -inf beyond `max_sl`."""
    arms, load = state.arms, state.load
    pulls, emitted, squares, drafted, decisions = known + state.hope
    emitted, squares, drafted = emitted / pulls, squares / pulls, drafted / pulls
    news = decisions.log1p() / pulls
    doubt = ((squares - emitted**2).clamp(min=0) * news).sqrt() + arms * news
    rows = load.rows[None].clamp(1, ROWS)
    step = load.draft[rows.long()]  # [1]
    time = drafted * step + load.verify[((1 + drafted) * rows).round().long().clamp(max=TOKENS)]
    exploration, switching = state["weights"].T[:, :, None]  # [B, 1] each
    begins = (state["last"] == 0)[:, None] & (arms > 0)
    index = (emitted + exploration * doubt) / (time + switching * step * begins).clamp(min=1e-9)
    return torch.where(arms <= state["max_sl"][:, None], index, -torch.inf)
